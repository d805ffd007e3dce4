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
from pruning.surgery import cut, mean_inputs, revive
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


def read_means(means: dict[str, Tensor]) -> list[Tensor]:
    """Of every group; the first layer reads the image."""
    return list(means.values())[1:]


@pytest.mark.parametrize("beta", [0.7, -0.7])
def test_the_means_of_silent_channels_are_relu_of_beta(beta: float) -> None:
    model, masks, images = constant_channels(beta)
    for mean, mask in zip(read_means(mean_inputs(model, [images])), masks, strict=True):
        assert torch.allclose(mean[~mask], torch.full_like(mean[~mask], max(beta, 0)))


def test_compensation_is_exact_away_from_the_padded_border() -> None:
    """The closed form: W_removed times the constant moves into the next running mean.

    A position sees the padding if its receptive field does. Height is reduced from 32 to 1, so
    every frame sees the upper border; the convolutions are therefore compared one by one, and the
    whole network with its padding filled as if the channel went on beyond the border.
    """
    model, masks, images = constant_channels(0.7)
    means = mean_inputs(model, [images])
    compact, dropped = cut(model, masks, means).eval(), cut(model, masks).eval()
    with torch.inference_mode():
        whole = border_free(model, images, masks, read_means(means))
        folded = border_free(compact, images, None, [])
        lost = border_free(dropped, images, None, [])
    assert (whole - folded).abs().max() < 1e-9
    assert (whole - lost).abs().max() > 1e-2


def border_free(
    model: Recogniser, images: Tensor, masks: list[Tensor] | None, means: list[Tensor]
) -> Tensor:
    """Logits with every constant channel padded by its own value instead of zero.

    Args:
        model: Uncut with masks, or compact without.
        images: (N, 3, 32, W).
        masks: Channels that are constant are False; None where they are gone already.
        means: Their values, where masks are given.
    """
    x, layer = images, 0
    for module in model.cnn:
        if isinstance(module, nn.Conv2d):
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            if masks is not None and layer > 0:
                border = torch.ones_like(padded[:1, :1])
                border[..., 1:-1, 1:-1] = 0
                constant = torch.where(masks[layer - 1], 0.0, means[layer - 1])
                padded = padded + border * constant[:, None, None]
            x = nn.functional.conv2d(padded, module.weight, stride=module.stride)
            layer += 1
        else:
            x = module(x)
    return model.head(model.rnn(x.squeeze(2).permute(2, 0, 1))[0])


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
    """With the zero-padded border as it is; 32 rows leave no frame that does not see it."""
    model, masks, images = constant_channels(0.4)
    means = mean_inputs(model, [images])
    with torch.inference_mode():
        truth = model.cnn(images)[:, masks[-1]]
        folded = (cut(model, masks, means).eval().cnn(images) - truth).square().mean()
        dropped = (cut(model, masks).eval().cnn(images) - truth).square().mean()
    assert folded < dropped / 2
