import pytest
import torch

from crnn.data.batches import Lines
from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings, TrainSettings
from crnn.training import Run, fit, start
from pruning.cost import latency_ms, parameters
from pruning.gammas import absolute_gammas, gamma_statistics, prunable
from pruning.settings import SparseSettings
from pruning.sparsity import Proximal, Subgradient, penalty_of
from tests.conftest import random_recogniser


def run_of(model: Recogniser) -> Run:
    return start(model, TrainSettings(epochs=1), seed=0)


def test_proximal_step_is_soft_thresholding() -> None:
    model = random_recogniser()
    before = [layer.weight.detach().clone() for layer in prunable(model).values()]
    Proximal(2.0).after_step(run_of(model), learning_rate=0.1, progress=0.5)
    for old, new in zip(before, prunable(model).values(), strict=True):
        expected = torch.nn.functional.softshrink(old, 0.2)
        assert torch.allclose(new.weight, expected)
    assert gamma_statistics(model)["gamma/share_zero"] > 0.05


def test_subgradient_adds_the_sign_to_the_gradient() -> None:
    model = random_recogniser()
    for layer in prunable(model).values():
        layer.weight.grad = torch.ones_like(layer.weight)
    Subgradient(0.25).before_step(run_of(model), learning_rate=0.1, progress=0.5)
    for layer in prunable(model).values():
        assert torch.equal(layer.weight.grad, 1 + 0.25 * layer.weight.sign())


@pytest.mark.parametrize(("method", "strength"), [("proximal", 1.0), ("subgradient", 0.1)])
def test_each_penalty_shrinks_the_gammas_in_training(
    lines: Lines, method: str, strength: float
) -> None:
    def mean_gamma(strength: float) -> float:
        torch.manual_seed(0)
        model = Recogniser(ModelSettings(width=0.05, hidden=4), lines.charset.classes)
        settings = SparseSettings(epochs=3, batch_size=8, method=method, strength=strength)
        fit(start(model, settings, 0), lines, settings, penalty_of(settings))
        return float(torch.cat(absolute_gammas(model)).mean())

    assert mean_gamma(strength) < mean_gamma(0.0)


def test_statistics_of_known_gammas() -> None:
    model = random_recogniser(width=0.02)
    for layer in prunable(model).values():
        layer.weight.data.fill_(0.5)
    next(iter(prunable(model).values())).weight.data[:1] = 0
    statistics = gamma_statistics(model)
    channels = sum(layer.num_features for layer in prunable(model).values())
    assert statistics["gamma/q50"] == 0.5
    assert statistics["gamma/share_zero"] == pytest.approx(1 / channels)
    assert statistics["gamma/share_near_zero"] == statistics["gamma/share_zero"]


def test_cost_figures_are_positive_and_add_up() -> None:
    model = random_recogniser(width=0.05).float()
    parts = parameters(model)
    assert parts["total"] == parts["cnn"] + parts["lstm"] + parts["head"]
    assert 0 < latency_ms(model, rounds=3) < 10_000


def test_training_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="epochs"):
        TrainSettings(epochs=0)
