import math

import pytest
import torch
import torch.nn.functional as F

from crnn.data.batches import Lines, evaluation_batches
from crnn.errors import NonFiniteLossError
from crnn.evaluation import evaluate, read
from crnn.networks.recogniser import Recogniser
from crnn.settings import AugmentSettings, ModelSettings, TrainSettings
from crnn.training import Penalty, Run, ctc_loss, fit, learning_rate_at, start
from tests.conftest import random_recogniser

OFF = AugmentSettings(affine=0, blur=0, noise=0, contrast=0, jpeg=0)


def test_a_small_network_learns_a_few_lines_by_heart(lines: Lines) -> None:
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(width=0.25), lines.charset.classes)
    settings = TrainSettings(epochs=120, batch_size=4, learning_rate=4e-3, augment=OFF)
    losses: list[float] = []
    fit(
        start(model, settings, 0),
        lines,
        settings,
        on_epoch=lambda m: losses.append(m["train/loss"]),
    )
    assert len(losses) == 120
    assert losses[-1] < 0.1 < losses[0]
    assert evaluate(model, lines, set())["val/word_accuracy"] > 0.9


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
