import copy
import math

import pytest
import torch
import torch.nn.functional as F

from crnn.data.batches import Lines, evaluation_batches, normalise
from crnn.devices import autocast, has_bfloat16
from crnn.errors import NonFiniteLossError
from crnn.evaluation import evaluate, read
from crnn.networks.recogniser import Recogniser
from crnn.settings import AugmentSettings, ModelSettings, TrainSettings
from crnn.training import (
    Penalty,
    Run,
    Teacher,
    ctc_loss,
    fit,
    learning_rate_at,
    recalibrate,
    start,
    train_step,
)
from tests.conftest import random_recogniser

OFF = AugmentSettings(affine=0, blur=0, noise=0, contrast=0, jpeg=0)


def test_a_small_network_learns_a_few_lines_by_heart(lines: Lines) -> None:
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(width=0.25), lines.charset.classes)
    settings = TrainSettings(epochs=80, batch_size=4, learning_rate=4e-3, augment=OFF)
    losses: list[float] = []
    fit(
        start(model, settings, 0),
        lines,
        settings,
        on_epoch=lambda m: losses.append(m["train/loss"]),
    )
    assert len(losses) == 80
    assert losses[-1] < 0.1 < losses[0]
    assert evaluate(model, lines, set())["val/word_accuracy"] > 0.9


def test_a_fresh_network_reads_blanks(lines: Lines) -> None:
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(width=0.1), lines.charset.classes).eval()
    batch = next(iter(evaluation_batches(lines)))
    with torch.no_grad():
        blanks = model(normalise(batch.images)).softmax(2)[..., 0]
    assert blanks.min() > 0.7
    assert blanks.max() < 0.9


def test_the_loss_looks_at_each_line_s_own_frames_only(lines: Lines) -> None:
    batch = next(iter(evaluation_batches(lines, 4)))
    logits = torch.randn(batch.images.shape[3] // 4, 4, 11, dtype=torch.float64)
    expected = []
    start_of = 0
    for n, length in enumerate(batch.target_lengths.tolist()):
        frames = max(1, int(batch.widths[n]) // 4)
        target = batch.targets[start_of : start_of + length]
        start_of += length
        one = F.ctc_loss(
            logits[:frames, n].log_softmax(1), target, torch.tensor(frames), torch.tensor(length)
        )
        expected.append(one)
        logits[frames:, n] = 1e6 * torch.randn_like(logits[frames:, n])
    assert torch.allclose(ctc_loss(logits, batch, 4), torch.stack(expected).mean())


def test_the_reading_of_a_line_does_not_depend_on_its_batch(lines: Lines) -> None:
    model = random_recogniser().float()
    together = {r.index: r for r in read(model, evaluation_batches(lines, 16), lines.charset)}
    for alone in read(model, evaluation_batches(lines, 1), lines.charset):
        other = together[alone.index]
        assert alone.text == other.text
        assert alone.confidence == pytest.approx(other.confidence, rel=1e-4)


def test_a_loss_that_is_not_finite_names_the_step_and_the_samples(lines: Lines) -> None:
    class Poison(Penalty):
        def after_step(self, run: Run, learning_rate: float, progress: float) -> None:
            if progress > 0.3:
                run.model.head.bias.data.fill_(math.inf)

    model = Recogniser(ModelSettings(width=0.05, hidden=4), lines.charset.classes)
    settings = TrainSettings(epochs=1, batch_size=8)
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, step 4.*rendered 0/\d+"):
        fit(start(model, settings, 0), lines, settings, Poison())


def test_a_gradient_that_is_not_finite_changes_no_weight(lines: Lines) -> None:
    model = Recogniser(ModelSettings(width=0.05, hidden=4), lines.charset.classes)
    model.head.bias.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(model.state_dict())
    settings = TrainSettings(epochs=1, batch_size=8)
    run = start(model, settings, 0)
    with pytest.raises(NonFiniteLossError, match=r"its gradient became .* epoch 1, step 1;"):
        fit(run, lines, settings)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_gradients_are_right_where_channels_last_computes_wrong_ones(lines: Lines) -> None:
    """RepVGG's first 1x1 convolution has a stride and three inputs: see devices.layout_of."""
    settings = TrainSettings(epochs=1, precision="float32")
    model = random_recogniser(backbone="repvgg_a0", width=1).train()
    exact, batch = copy.deepcopy(model), next(iter(evaluation_batches(lines, 16)))
    ctc_loss(exact(normalise(batch.images).double()), batch, exact.stride).backward()
    torch.nn.utils.clip_grad_norm_(exact.parameters(), settings.clip_norm)
    train_step(start(model.float(), settings, 0), batch, 0.0, settings, Penalty())
    for (name, trained), reference in zip(
        model.named_parameters(), exact.parameters(), strict=True
    ):
        assert trained.grad is not None
        assert reference.grad is not None
        error = (trained.grad - reference.grad).norm()
        assert error <= 0.05 * reference.grad.norm() + 1e-6, name


def test_bfloat16_is_for_networks_that_are_faster_in_it() -> None:
    vgg, depthwise = random_recogniser(), random_recogniser(1, backbone="mobilenetv3_small_100")
    found = []
    for model, precision in ((vgg, "auto"), (vgg, "float32"), (depthwise, "auto")):
        with autocast(model, precision):
            found.append(torch.is_autocast_enabled("cpu"))
    assert found == [has_bfloat16(torch.device("cpu")), False, False]


def test_learning_rate_rises_once_and_falls_to_zero() -> None:
    settings = TrainSettings(epochs=1, learning_rate=1e-2, warmup=0.25)
    rates = [learning_rate_at(p / 100, settings) for p in range(101)]
    assert rates[0] == pytest.approx(1e-2 / 25)
    assert rates[25] == max(rates) == 1e-2
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_only_matrices_decay() -> None:
    model = random_recogniser()
    decayed, others = start(model, TrainSettings(epochs=1), 0).optimizer.param_groups
    assert decayed["weight_decay"] > 0
    assert others["weight_decay"] == 0
    gammas = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert gammas
    assert gammas <= {id(p) for p in others["params"]}


def test_a_teacher_s_loss_is_the_divergence_over_each_line_s_own_frames(lines: Lines) -> None:
    batch = next(iter(evaluation_batches(lines, 4)))
    images = normalise(batch.images).double()
    student, teacher = random_recogniser(seed=1), random_recogniser(seed=2)
    with torch.no_grad():
        logits, targets = student(images) / 2, teacher(images) / 2
    frames = []
    for n, width in enumerate(batch.widths.tolist()):
        for t in range(width // 4):
            p, q = targets[t, n].softmax(0), logits[t, n].softmax(0)
            frames.append((p * (p.log() - q.log())).sum())
    expected = 3.0 * 4 * torch.stack(frames).mean()
    found = Teacher(teacher, 3.0).loss(images, 2 * logits, batch.widths, "float32")
    assert torch.allclose(found, expected)
    assert Teacher(teacher, 3.0).loss(images, 2 * targets, batch.widths, "float32").abs() < 1e-12


def test_a_student_learns_from_its_teacher_alone(lines: Lines) -> None:
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(width=0.05, hidden=4), lines.charset.classes)
    settings = TrainSettings(epochs=2, batch_size=8)
    plain, taught = start(copy.deepcopy(model), settings, 0), start(model, settings, 0)
    taught.teacher = Teacher(random_recogniser(width=0.05).float(), 1.0)
    before = copy.deepcopy(taught.teacher.model.state_dict())
    fit(plain, lines, settings)
    fit(taught, lines, settings)
    assert not torch.equal(plain.model.head.weight, taught.model.head.weight)
    after = taught.teacher.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_recalibration_gives_the_mean_statistics_of_the_lines(lines: Lines) -> None:
    model = random_recogniser().float()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    recalibrate(model, lines)
    first = model.cnn[0]
    means = [first(normalise(batch.images)).mean((0, 2, 3)) for batch in evaluation_batches(lines)]
    assert torch.allclose(model.cnn[1].running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert model.cnn[1].momentum == 0.1
