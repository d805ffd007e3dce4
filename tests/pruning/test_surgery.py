"""The cut network against the uncut one, in float64, with statistics that hide nothing."""

import pytest
import torch
from torch import Tensor, nn

from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings
from pruning.cost import parameters
from pruning.coupling import LSTM_INPUTS, groups_of
from pruning.gammas import absolute_gammas, norms_of
from pruning.selection import keep_masks
from pruning.settings import PruneSettings
from pruning.surgery import _sums_by_tap, cut, mean_inputs, revive
from tests.conftest import random_recogniser


def silence(model: Recogniser, masks: list[Tensor], beta: float = 0.0) -> None:
    """Gammas of the channels to be cut to zero, their betas to a constant."""
    norms = norms_of(model)
    with torch.no_grad():
        for group, mask in zip(groups_of(model), masks, strict=True):
            for name, channels in group.norms.items():
                norms[name].weight[~mask[channels]] = 0
                norms[name].bias[~mask[channels]] = beta


def random_masks(model: Recogniser, ratio: float, min_channels: int = 1) -> list[Tensor]:
    settings = PruneSettings(min_channels=min_channels)
    return keep_masks(absolute_gammas(model), ratio, settings)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.62, 0.75, 0.87])
def test_cutting_silent_channels_changes_nothing(ratio: float) -> None:
    model = random_recogniser(width=0.15)
    masks = random_masks(model, ratio)
    silence(model, masks)
    compact = cut(model, masks).eval()
    assert [len(g) for g in absolute_gammas(compact)] == [int(m.sum()) for m in masks]
    images = torch.randn(2, 3, 32, 96, dtype=torch.float64)
    with torch.inference_mode():
        assert (model(images) - compact(images)).abs().max() < 1e-9


def test_the_article_s_cut_has_its_published_size() -> None:
    """Widths, and parameters by part, of the article at a ratio of 0.62."""
    model = Recogniser(ModelSettings(), 5963)
    widths = (36, 50, 73, 92, 90, 119, 94, 134, 253, 177)
    full = [len(g) for g in absolute_gammas(model)]
    masks = [torch.arange(c) < kept for c, kept in zip(full, widths, strict=True)]
    assert parameters(cut(model, masks)) == {
        "cnn": 1_205_797,
        "lstm": 143_232,
        "head": 578_411,
        "total": 1_927_440,
    }


@pytest.mark.parametrize("layer", range(10))
def test_a_layer_may_be_left_with_one_channel(layer: int) -> None:
    model = random_recogniser()
    masks = [torch.ones(len(g), dtype=torch.bool) for g in absolute_gammas(model)]
    masks[layer][:] = False
    masks[layer][-1] = True
    silence(model, masks)
    compact = cut(model, masks).eval()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert (model(images) - compact(images)).abs().max() < 1e-9


def test_both_directions_of_the_lstm_lose_the_same_inputs() -> None:
    model = random_recogniser()
    masks = [torch.ones(len(g), dtype=torch.bool) for g in absolute_gammas(model)]
    masks[-1][::2] = False
    compact = cut(model, masks)
    for name in LSTM_INPUTS:
        kept = model.get_parameter(name)[:, masks[-1]]
        assert torch.equal(compact.get_parameter(name), kept)


def test_the_uncut_network_is_left_as_it_is() -> None:
    model = random_recogniser()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = random_masks(model, 0.5)
    cut(model, masks, mean_inputs(model, [torch.ones(1, 3, 32, 32, dtype=torch.float64)]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def constant_channels(beta: float) -> tuple[Recogniser, list[Tensor], Tensor]:
    model = random_recogniser(width=0.15)
    masks = random_masks(model, 0.6)
    silence(model, masks, beta)
    return model, masks, torch.randn(2, 3, 32, 480, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.7, -0.7])
def test_the_means_of_silent_channels_are_relu_of_beta(beta: float) -> None:
    """Where the LSTM reads them; a convolution's outer taps read padding as well."""
    model, masks, images = constant_channels(beta)
    means = mean_inputs(model, [images])
    *_, mean = means.values()
    assert torch.allclose(mean[~masks[-1]], torch.full_like(mean[~masks[-1]], max(beta, 0)))
    centre = means["cnn.3"][~masks[0]][:, 1, 1]
    assert torch.allclose(centre, torch.full_like(centre, max(beta, 0)))
    assert means["cnn.3"].shape == (len(masks[0]), 3, 3)


@pytest.mark.parametrize("group", range(9))
def test_what_folding_leaves_out_has_a_mean_of_zero(group: int) -> None:
    """For any channels, padding included: the next BatchNorm sees the mean that it saw before."""
    model = random_recogniser(width=0.15).eval()
    masks = [torch.ones(len(g), dtype=torch.bool) for g in absolute_gammas(model)]
    masks[group][::2] = False
    images = torch.randn(2, 3, 32, 96, dtype=torch.float64)
    compact = cut(model, masks, mean_inputs(model, [images])).eval()
    expected, found = (centred_means(network, images)[group + 1] for network in (model, compact))
    assert torch.allclose(expected, found, rtol=0, atol=1e-12)


def centred_means(model: Recogniser, images: Tensor) -> list[Tensor]:
    """For each BatchNorm the mean of its input over lines and positions, less its running mean."""
    seen = []
    for module in model.cnn:
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            seen.append((images.mean((0, 2, 3)) - module.running_mean).detach())
        images = module(images)
    return seen


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 0, 1), (5, (2, 1), 2, 1), (3, 1, "same", 2), (2, 2, 0, 1)],
)
def test_means_by_tap_are_those_that_a_convolution_sums(
    kernel: int, stride: int | tuple[int, int], padding: int | str, dilation: int
) -> None:
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=False).double()
    images = torch.randn(2, 3, 32, 33, dtype=torch.float64)
    sums = _sums_by_tap(layer, images, output := layer(images))
    expected = output.sum((0, 2, 3))
    assert torch.allclose(layer.weight.flatten(1) @ sums.flatten(), expected)


def test_faded_channels_that_are_kept_start_again_from_the_same_function() -> None:
    model = random_recogniser(width=0.15)
    masks = random_masks(model, 0.5)
    silence(model, masks)
    images = torch.randn(2, 3, 32, 96, dtype=torch.float64)
    with torch.inference_mode():
        before = model(images)
    generous = [mask | (torch.arange(len(mask)) % 3 == 0) for mask in masks]
    revive(model, generous)
    compact = cut(model, generous).eval()
    assert sum(int((g == 0).sum()) for g in absolute_gammas(compact)) == 0
    with torch.inference_mode():
        assert (before - compact(images)).abs().max() < 1e-9
    compact.train()(images).square().sum().backward()
    idle = [g & ~m for g, m in zip(generous, masks, strict=True)]
    convolutions = [m for m in compact.modules() if isinstance(m, nn.Conv2d)]
    for index, reader in enumerate(convolutions[1:]):
        revived = idle[index][generous[index]]
        gradient = reader.weight.grad
        assert gradient is not None
        assert (gradient[:, revived].abs().sum((0, 2, 3)) > 0).all(), "they learn again"


def test_compensation_stays_nearer_to_the_uncut_network_than_dropping() -> None:
    """32 rows leave no frame that does not see the zero-padded border."""
    model, masks, images = constant_channels(0.4)
    means = mean_inputs(model, [images])
    with torch.inference_mode():
        truth = model.cnn(images)[:, masks[-1]]
        folded = (cut(model, masks, means).eval().cnn(images) - truth).square().mean()
        dropped = (cut(model, masks).eval().cnn(images) - truth).square().mean()
    assert folded < dropped / 4
