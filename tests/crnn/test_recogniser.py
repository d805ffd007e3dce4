"""The network of the article, its shapes and published counts; how networks of timm begin."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings
from pruning.cost import macs, parameters
from pruning.gammas import norms_of
from tests.conftest import random_recogniser

ARTICLE_CLASSES = 5963


def test_parameter_counts_of_the_article() -> None:
    model = Recogniser(ModelSettings(), ARTICLE_CLASSES)
    assert parameters(model) == {
        "cnn": 9_407_936,
        "lstm": 271_872,
        "head": 578_411,
        "total": 10_258_219,
    }
    assert [layer.num_features for layer in norms_of(model).values()] == [
        64, 64, 128, 128, 256, 256, 512, 512, 512, 512,
    ]  # fmt: skip


@pytest.mark.parametrize("width", [32, 36, 100, 128, 320])
def test_a_frame_is_four_pixels_wide(width: int) -> None:
    model = random_recogniser(width=0.05)
    images = torch.zeros(2, 3, 32, width, dtype=torch.float64)
    assert model.cnn(images).shape[1:] == (26, 1, width // 4)
    assert model(images).shape == (width // 4, 2, 11)


def test_the_width_factor_scales_every_layer() -> None:
    full, quarter = (Recogniser(ModelSettings(width=w), 10) for w in (1.0, 0.25))
    for a, b in zip(norms_of(full).values(), norms_of(quarter).values(), strict=True):
        assert a.num_features == 4 * b.num_features
    assert full.rnn.hidden_size == quarter.rnn.hidden_size == 48


def test_macs_agree_with_an_independent_count() -> None:
    model = Recogniser(ModelSettings(width=0.25), 100)
    with FlopCounterMode(display=False) as counter:
        model.cnn(torch.zeros(1, 3, 32, 128))
    hidden, features = 48, 128
    first, second = (2 * 4 * hidden * (i + hidden) for i in (features, 2 * hidden))
    assert macs(model) == counter.get_total_flops() // 2 + 32 * (first + second + 96 * 100)


def test_macs_at_full_width_with_a_small_charset() -> None:
    assert macs(Recogniser(ModelSettings(), 65)) == pytest.approx(1314e6, rel=0.001)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_100", "ghostnet_100", "resnet34"])
def test_networks_of_timm_halve_the_width_first_and_late(backbone: str) -> None:
    model = random_recogniser(1, backbone=backbone)
    widths: dict[int, set[int]] = {}

    def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        widths.setdefault(output.shape[2], set()).add(output.shape[3])

    for layer in model.cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        model.cnn(torch.zeros(1, 3, 32, 64, dtype=torch.float64))
    assert widths == {16: {32}, 8: {32}, 4: {32}, 2: {16}, 1: {16}}


def test_depthwise_weights_start_as_large_as_others() -> None:
    model = Recogniser(ModelSettings(backbone="mobilenetv3_small_100"), 11)
    for layer in model.cnn.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels // layer.groups * layer.weight[0, 0].numel()
            found = float(layer.weight.detach().square().mean()) * fan_out
            assert found == pytest.approx(2, rel=0.3)
