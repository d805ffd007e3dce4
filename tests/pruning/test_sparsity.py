import math

import pytest
import torch

from crnn.data.batches import Lines
from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings, TrainSettings
from crnn.training import Run, fit, start
from pruning.cost import latency_ms, parameters
from pruning.coupling import groups_of
from pruning.gammas import absolute_gammas, gamma_statistics, norms_of
from pruning.settings import SparseSettings
from pruning.sparsity import (
    FLOOR,
    Auto,
    Polarization,
    Proximal,
    Subgradient,
    floor_of,
    largest_target,
    penalty_of,
)
from tests.conftest import TIMM, random_recogniser


def run_of(model: Recogniser) -> Run:
    return start(model, TrainSettings(epochs=1), seed=0)


def test_proximal_step_is_soft_thresholding() -> None:
    model = random_recogniser()
    before = [layer.weight.detach().clone() for layer in norms_of(model).values()]
    Proximal(2.0).after_step(run_of(model), learning_rate=0.1, progress=0.5)
    for old, new in zip(before, norms_of(model).values(), strict=True):
        expected = torch.nn.functional.softshrink(old, 0.2)
        assert torch.allclose(new.weight, expected)
    assert gamma_statistics(model)["gamma/share_zero"] > 0.05


def test_polarization_steps_down_its_own_gradient() -> None:
    model = random_recogniser()
    for layer in norms_of(model).values():
        layer.weight.data.abs_().clamp_(0.05, 0.95)
    gammas = torch.cat(absolute_gammas(model)).requires_grad_()
    (1.2 * gammas.abs().sum() - (gammas - gammas.mean()).abs().sum()).backward()
    assert gammas.grad is not None
    Polarization(0.5).after_step(run_of(model), learning_rate=0.01, progress=0.5)
    expected = gammas.detach() - 0.01 * 0.5 * gammas.grad
    assert torch.allclose(torch.cat(absolute_gammas(model)), expected)


def test_subgradient_adds_the_sign_to_the_gradient() -> None:
    model = random_recogniser()
    for layer in norms_of(model).values():
        layer.weight.grad = torch.ones_like(layer.weight)
    Subgradient(0.25).before_step(run_of(model), learning_rate=0.1, progress=0.5)
    for layer in norms_of(model).values():
        assert torch.equal(layer.weight.grad, 1 + 0.25 * layer.weight.sign())


@pytest.mark.parametrize(
    ("method", "strength"), [("proximal", 1.0), ("subgradient", 0.1), ("polarization", 5.0)]
)
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
    for layer in norms_of(model).values():
        layer.weight.data.fill_(0.5)
    next(iter(norms_of(model).values())).weight.data[:1] = 0
    statistics = gamma_statistics(model)
    channels = sum(layer.num_features for layer in norms_of(model).values())
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


@pytest.mark.parametrize(("target", "width"), [(0.5, 0.1), (0.87, 0.2), (0.99, 0.1)])
def test_auto_reaches_its_target_in_exact_zeros_and_leaves_every_layer_its_floor(
    lines: Lines, target: float, width: float
) -> None:
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(width=width, hidden=4), lines.charset.classes)
    settings = SparseSettings(epochs=16, batch_size=4, target_ratio=target)
    run = start(model, settings, 0)
    fit(run, lines, settings, penalty_of(settings))
    gammas = absolute_gammas(model)
    floors = [max(1, math.ceil(FLOOR * len(g))) for g in gammas]
    reachable = 1 - sum(floors) / sum(len(g) for g in gammas)
    share = gamma_statistics(model)["gamma/share_zero"]
    assert share >= 0.99 * min(target, reachable)
    assert share <= target
    for gamma, floor in zip(gammas, floors, strict=True):
        assert (gamma > 0).sum() >= floor
    dead = torch.cat(gammas) == 0
    assert (torch.cat([layer.bias for layer in norms_of(model).values()])[dead] == 0).all()
    assert run.memory["deaths"][dead].sort().values.tolist() == list(range(1, int(dead.sum()) + 1))
    assert (run.memory["deaths"][~dead] == 0).all()


@pytest.mark.parametrize("backbone", TIMM)
def test_auto_reaches_its_target_in_every_network(lines: Lines, backbone: str) -> None:
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(backbone=backbone, hidden=4), lines.charset.classes)
    settings = SparseSettings(epochs=2, batch_size=10, target_ratio=0.87)
    fit(start(model, settings, 0), lines, settings, penalty_of(settings))
    assert 0.99 * 0.87 <= gamma_statistics(model)["gamma/share_zero"] <= 0.87
    for group, gamma in zip(groups_of(model), absolute_gammas(model), strict=True):
        assert (gamma > 0).sum() >= floor_of(group, settings) >= 1


def test_auto_reaches_targets_that_take_whole_branches(lines: Lines) -> None:
    """Where branches may go, and nowhere else is a layer left without a channel."""
    torch.manual_seed(0)
    backbone = ModelSettings(backbone="mobilenetv3_small_100", hidden=4)
    model = Recogniser(backbone, lines.charset.classes)
    settings = SparseSettings(epochs=2, batch_size=10, target_ratio=0.96)
    assert largest_target(model, settings) < 0.99 * 0.96
    settings = settings.model_copy(update={"drop_branches": True})
    assert largest_target(model, settings) > 0.96
    fit(start(model, settings, 0), lines, settings, penalty_of(settings))
    assert 0.99 * 0.96 <= gamma_statistics(model)["gamma/share_zero"] <= 0.96
    pairs = list(zip(groups_of(model), absolute_gammas(model), strict=True))
    gone = {group.branch for group, gamma in pairs if not gamma.any()}
    assert gone
    assert None not in gone


def test_the_last_channels_of_a_branch_stand_for_all_of_it() -> None:
    """Alone they seem to matter nothing: BatchNorm undoes what ReLU lets through, however large."""
    torch.manual_seed(0)
    model = random_recogniser(width=1.0, backbone="resnet34")
    model.train()
    groups, norms = groups_of(model), norms_of(model)
    block = next(group for group in groups if group.branch)
    for parameter in (norms[block.name].weight, norms[block.name].bias):
        parameter.data[1:] = 0
    images, end = torch.randn(4, 3, 32, 64, dtype=torch.float64), norms[f"{block.branch}.bn2"]
    end.eps = 1e-12  # What is left of the channel's own importance is this one's doing.

    def loss(scale: float = 1.0) -> torch.Tensor:
        end.weight.data.mul_(scale)
        found = model(images).log_softmax(2)[..., 0].mean()
        end.weight.data.div_(scale)
        return found

    loss().backward()
    penalty, run = Auto(SparseSettings(epochs=1, drop_branches=True)), run_of(model)
    penalty.before_step(run, 0.1, 0.5)
    with torch.no_grad():
        slope = float(loss(1 + 1e-9) - loss(1 - 1e-9)) / 2e-9
    place = groups.index(block)
    of_branch = run.memory["branches"][place]
    assert of_branch == pytest.approx(abs(slope), rel=1e-3)
    first = sum(group.size for group in groups[:place])
    own = run.memory["importance"][first : first + block.size].clone()
    assert own[0] < 1e-3 * of_branch
    own[1:] = -1
    ranked = penalty._protected(block, own, of_branch)
    assert ranked[0] == own[0] + of_branch
    assert (ranked[1:] == -1).all()


def test_auto_takes_the_channels_that_matter_least(lines: Lines) -> None:
    """A channel that nothing reads costs nothing, however large its gamma."""
    torch.manual_seed(0)
    model = Recogniser(ModelSettings(width=0.1, hidden=4), lines.charset.classes)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    unread = slice(0, 6)
    mask = torch.ones_like(convolutions[5].weight)
    mask[:, unread] = 0
    convolutions[5].weight.data.mul_(mask)
    convolutions[5].weight.register_hook(lambda grad: grad * mask)
    list(norms_of(model).values())[4].weight.data[unread] = 2.0
    settings = SparseSettings(epochs=30, batch_size=4, target_ratio=0.2)
    fit(start(model, settings, 0), lines, settings, penalty_of(settings))
    assert (absolute_gammas(model)[4][unread] == 0).all()
