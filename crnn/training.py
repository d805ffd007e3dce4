"""The one training loop: baseline, sparse, fine-tune and controls differ by arguments alone."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crnn.data.batches import (
    Batch,
    Batches,
    Lines,
    evaluation_batches,
    normalise,
    training_batches,
)
from crnn.devices import autocast, layout_of
from crnn.distributed import in_turn, mean, together, weight
from crnn.errors import NonFiniteLossError
from crnn.evaluation import frame_lengths
from crnn.networks.recogniser import Recogniser
from crnn.settings import TrainSettings

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Teacher:
    """A network whose readings a run learns from beside the labels.

    Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531), frame by frame: student and
    teacher have the same stride, so that their frames are aligned.

    Attributes:
        model: In evaluation mode, on the device of the student.
        weight: Of its loss beside the CTC loss.
    """

    model: Recogniser
    weight: float

    TEMPERATURE = 2.0
    """Divides the logits of both, so that the teacher's second thoughts count."""

    def loss(self, images: Tensor, logits: Tensor, widths: Tensor, precision: str) -> Tensor:
        """Mean over a line's own frames of KL(teacher, student), times TEMPERATURE squared, nats.

        Args:
            images: (N, 3, 32, W), normalised.
            logits: (T, N, K) of the student.
            widths: (N,) of the lines, pixels.
            precision: As in TrainSettings.
        """
        with torch.no_grad(), autocast(self.model, precision):
            targets = self.model(images)
        student, teacher = ((part / self.TEMPERATURE).log_softmax(2) for part in (logits, targets))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(2)
        lengths = frame_lengths(widths, self.model.stride).to(logits.device)
        own = torch.arange(len(logits), device=logits.device)[:, None] < lengths
        share = weight(int(lengths.sum()), logits.device)
        return self.weight * self.TEMPERATURE**2 * share * divergence[own].mean()


@dataclass
class Run:
    """A training under way: what a checkpoint has to hold to go on from it.

    Attributes:
        model: The network.
        optimizer: With its moments.
        seed: With the epoch it fixes order and augmentation.
        epoch: Number of epochs done.
        memory: Tensors that a penalty keeps from step to step, by name.
        teacher: Of the network, or None; no part of the checkpoint.
        network: The model as all processes train it together, while they do.
    """

    model: Recogniser
    optimizer: torch.optim.Optimizer
    seed: int
    epoch: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    teacher: Teacher | None = None
    network: nn.Module | None = None


class Penalty:
    """What sparse training adds to the loop; this one adds nothing."""

    def before_step(self, run: Run, learning_rate: float, progress: float) -> None:
        """Called when gradients are there, after clipping."""

    def after_step(self, run: Run, learning_rate: float, progress: float) -> None:
        """Called when the optimizer has moved the weights; progress in [0, 1) of the stage."""


def start(model: Recogniser, settings: TrainSettings, seed: int) -> Run:
    """A fresh run. BatchNorm scales and all biases are kept out of weight decay."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return Run(model, torch.optim.AdamW(groups, lr=settings.learning_rate), seed)


def learning_rate_at(progress: float, settings: TrainSettings) -> float:
    """One-cycle schedule (Smith 2018, arXiv:1803.09820): cosine up, then cosine down to zero.

    Args:
        progress: Share of all steps done, in [0, 1].
        settings: Largest rate and the share of the steps that rise to it.
    """
    if progress < settings.warmup:
        phase = progress / settings.warmup
        low = settings.learning_rate / 25
        return low + (settings.learning_rate - low) * (1 - math.cos(math.pi * phase)) / 2
    phase = (progress - settings.warmup) / max(1 - settings.warmup, 1e-9)
    return settings.learning_rate * (1 + math.cos(math.pi * phase)) / 2


def ctc_loss(logits: Tensor, batch: Batch, stride: int) -> Tensor:
    """Mean over the lines of CTC loss / label length (Graves et al. 2006), nats.

    Args:
        logits: (T, N, K); frames past a line's own width are not looked at.
        batch: Targets and widths of the N lines.
        stride: Pixels for each frame.
    """
    return F.ctc_loss(
        logits.log_softmax(2),
        batch.targets.to(logits.device),
        frame_lengths(batch.widths, stride),
        batch.target_lengths,
    )


def fit(
    run: Run,
    lines: Lines,
    settings: TrainSettings,
    penalty: Penalty | None = None,
    on_step: Progress | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train until settings.epochs are done, from wherever the run stands.

    Args:
        run: Changed in place; run.epoch is raised after each epoch, before on_epoch.
        lines: Training samples.
        settings: Schedule, batch size, augmentation, precision.
        penalty: Sparsity, or None.
        on_step: Called with (step in epoch, steps an epoch, loss).
        on_epoch: Called with the epoch's metrics.

    Raises:
        NonFiniteLossError: The loss is infinite or nan; names the step and the samples.
    """
    run.model.to(memory_format=layout_of(run.model))
    penalty = penalty or Penalty()
    with together(run.model) as run.network:
        while run.epoch < settings.epochs:
            begun = time.perf_counter()
            batches = training_batches(lines, settings, run.seed, run.epoch)
            loss = _epoch(run, batches, settings, penalty, on_step)
            run.epoch += 1
            seconds = time.perf_counter() - begun
            if on_epoch:
                on_epoch(
                    {
                        "train/loss": loss,
                        "train/learning_rate": run.optimizer.param_groups[0]["lr"],
                        "train/lines_per_second": len(lines) / seconds,
                        "train/seconds": seconds,
                    }
                )


def _epoch(
    run: Run,
    batches: Batches,
    settings: TrainSettings,
    penalty: Penalty,
    on_step: Progress | None,
) -> float:
    """One pass over the lines; returns their mean loss."""
    run.model.train()
    steps, total, lines = len(batches), 0.0, 0
    for step, batch in enumerate(batches):
        progress = (run.epoch * steps + step) / (settings.epochs * steps)
        value = train_step(run, batch, progress, settings, penalty)
        if not math.isfinite(value):
            raise _non_finite(value, run.epoch, step, batch)
        total += value * batch.size
        lines += batch.size
        if on_step:
            on_step(step + 1, steps, value)
    return total / lines


def train_step(
    run: Run, batch: Batch, progress: float, settings: TrainSettings, penalty: Penalty
) -> float:
    """Take one optimizer step and return the loss; where it or its gradient is not finite, none.

    Args:
        run: Changed in place; its network should be in its layout and in training mode.
        batch: Lines.
        progress: Share of all steps done, in [0, 1).
        settings: Schedule, precision.
        penalty: Sparsity.

    Returns:
        The loss; or what is not finite, that or the norm of its gradient.
    """
    device = run.model.device
    images = normalise(batch.images.to(device)).contiguous(memory_format=layout_of(run.model))
    with autocast(run.model, settings.precision):
        logits = (run.network or run.model)(images)
    loss = ctc_loss(logits, batch, run.model.stride) * weight(len(batch.names), device)
    if run.teacher:
        loss = loss + run.teacher.loss(images, logits, batch.widths, settings.precision)
    value = float(mean(loss))
    if not math.isfinite(value):
        return value
    rate = learning_rate_at(progress, settings)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip_norm))
    if not math.isfinite(norm):
        return norm
    penalty.before_step(run, rate, progress)
    run.optimizer.step()
    penalty.after_step(run, rate, progress)
    return value


def recalibrate(model: Recogniser, lines: Lines) -> None:
    """Estimate the BatchNorm statistics anew, as the mean over batches of unchanged lines.

    As EagleEye does (Li et al. 2020, arXiv:2007.02491); weights stay as they are.

    Args:
        model: Changed in place.
        lines: Training samples, at least a few hundred for a steady estimate.
    """
    device = model.device
    estimate_statistics(
        model, (normalise(batch.images.to(device)) for batch in evaluation_batches(lines))
    )


@torch.no_grad()
def estimate_statistics(model: Recogniser, images: Iterable[Tensor]) -> None:
    """Give every BatchNorm the mean over batches (N, 3, 32, W), normalised, as its statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # A plain mean over the batches.
    model.train()
    for batch in images:
        model.cnn(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _non_finite(value: float, epoch: int, step: int, batch: Batch) -> NonFiniteLossError:
    names = chain.from_iterable(in_turn([batch.names]))
    return NonFiniteLossError(
        f"the loss or its gradient became {value} in epoch {epoch + 1}, step {step + 1}; lower the"
        f" learning rate, or look at the samples of that batch: {', '.join(names)}"
    )
