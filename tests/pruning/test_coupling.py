"""Groups of coupled channels, and cuts of every backbone against the masked network."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, load_checkpoint, reader_of, save_checkpoint
from crnn.errors import CheckpointError, SettingsError
from crnn.export import export_onnx
from crnn.networks.branches import shortcuts_of
from crnn.networks.deploy import deployed
from crnn.networks.recogniser import Recogniser
from crnn.reading import load_exported
from crnn.settings import ExportSettings
from pruning.cost import COSTS, macs, parameters
from pruning.coupling import LSTM_INPUTS, groups_of
from pruning.gammas import absolute_gammas, norms_of, widths
from pruning.selection import keep_masks
from pruning.settings import PruneSettings
from pruning.surgery import cut, mean_inputs, refuse_uncuttable, revive
from tests.conftest import TIMM, random_recogniser
from tests.pruning.test_surgery import silence


def random_network(backbone: str) -> Recogniser:
    return random_recogniser(width=0.2 if backbone == "vgg13" else 1.0, backbone=backbone)


@pytest.fixture(scope="module", params=["vgg13", *TIMM])
def network(request: pytest.FixtureRequest) -> Recogniser:
    return random_network(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 32, 64, generator=chance, dtype=torch.float64)


def test_the_groups_of_vgg13_are_its_closed_form() -> None:
    """One for each convolution: its rows, its BatchNorm, and the columns of what reads it."""
    model = random_network("vgg13")
    convolutions = [f"cnn.{n}" for n, m in model.cnn.named_modules() if isinstance(m, nn.Conv2d)]
    groups = groups_of(model)
    assert [group.name for group in groups] == list(norms_of(model))
    for index, group in enumerate(groups):
        readers = [f"{name}.weight" for name in convolutions[index + 1 : index + 2]]
        parts = ("weight", "bias", "running_mean", "running_var")
        axes = {(f"{convolutions[index]}.weight", 0)}
        axes |= {(f"{group.name}.{part}", 0) for part in parts}
        axes |= {(name, 1) for name in readers or LSTM_INPUTS}
        assert set(group.axes) == axes
        for channels in [*group.axes.values(), *group.norms.values()]:
            assert channels.tolist() == list(range(group.size))


def test_every_norm_is_in_one_group(network: Recogniser) -> None:
    named = [name for group in groups_of(network) for name in group.norms]
    assert sorted(named) == sorted(norms_of(network))
    for group in groups_of(network):
        for channels in group.axes.values():
            assert set(channels.tolist()) == set(range(group.size))


def test_masked_and_compact_networks_agree_and_shrink_with_the_ratio(
    network: Recogniser, images: Tensor
) -> None:
    costs = [(macs(network), parameters(network)["total"])]
    for ratio in (0.3, 0.62, 0.87):
        masked = copy.deepcopy(network)
        masks = keep_masks(absolute_gammas(masked), ratio, PruneSettings())
        silence(masked, masks)
        compact = cut(masked, masks)
        with torch.inference_mode():
            assert (masked(images) - compact(images)).abs().max() < 1e-9
        for group, mask in zip(groups_of(network), masks, strict=True):
            for name, channels in group.norms.items():
                assert norms_of(compact)[name].num_features == int(mask[channels].sum())
        costs.append((macs(compact), parameters(compact)["total"]))
    for before, after in pairwise(costs):
        assert after[0] < before[0]
        assert after[1] < before[1]


def test_the_export_of_a_cut_network_reads_as_it_does(network: Recogniser, tmp_path: Path) -> None:
    masks = keep_masks(absolute_gammas(network), 0.62, PruneSettings())
    compact = cut(network, masks).float().eval()
    checkpoint = Checkpoint(compact, Charset("0123456789"), 160, "finetune")
    export_onnx(tmp_path / "model.onnx", checkpoint, ExportSettings(), {})
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 96, 3), dtype=np.uint8)
    found = load_exported(tmp_path / "model.onnx").probabilities(pixels)
    assert np.abs(found - reader_of(checkpoint).probabilities(pixels)).max() < 1e-4


def test_other_strides_than_in_training_are_refused(tmp_path: Path) -> None:
    model = random_network("mobilenetv3_small_100")
    model.cnn.get_submodule("net.conv_stem").stride = (1, 1)  # What another timm might build.
    save_checkpoint(tmp_path / "a", Checkpoint(model, Charset("0123456789"), 160, "baseline"))
    with pytest.raises(CheckpointError, match="other strides than it was trained with"):
        load_checkpoint(tmp_path / "a")


def test_faded_channels_start_again_from_the_same_function(
    network: Recogniser, images: Tensor
) -> None:
    model = copy.deepcopy(network)
    masks = keep_masks(absolute_gammas(model), 0.6, PruneSettings())
    silence(model, masks)
    generous = [mask | (torch.arange(len(mask)) % 3 == 0) for mask in masks]
    with torch.inference_mode():
        before = model(images)
    revive(model, generous)
    compact = cut(model, generous)
    assert all((gamma > 0).all() for gamma in absolute_gammas(compact))
    with torch.inference_mode():
        assert (before - compact(images)).abs().max() < 1e-9


def test_constants_are_kept_better_than_dropped(network: Recogniser, images: Tensor) -> None:
    model = copy.deepcopy(network)
    masks = keep_masks(absolute_gammas(model), 0.5, PruneSettings())
    silence(model, masks, beta=0.4)
    folded = cut(model, masks, mean_inputs(model, [images]))
    with torch.inference_mode():
        truth = model(images)
        kept = (folded(images) - truth).square().mean()
        dropped = (cut(model, masks)(images) - truth).square().mean()
    assert kept < dropped


def test_a_cut_network_is_saved_and_loaded_to_the_same_bits(
    network: Recogniser, images: Tensor, tmp_path: Path
) -> None:
    masks = keep_masks(absolute_gammas(network), 0.62, PruneSettings())
    compact = cut(network, masks).float().eval()
    save_checkpoint(tmp_path / "cut", Checkpoint(compact, Charset("0123456789"), 160, "prune"))
    loaded = load_checkpoint(tmp_path / "cut").model
    with torch.inference_mode():
        assert torch.equal(loaded(images.float()), compact(images.float()))
    assert widths(loaded) == widths(compact)


@pytest.mark.parametrize("backbone", ["resnet34", "mobilenetv3_small_100", "efficientnet_b0"])
def test_a_dead_branch_goes_as_a_whole_and_nothing_changes(
    images: Tensor, tmp_path: Path, backbone: str
) -> None:
    """Whether all branches go or one, with channels of the other groups; the file says which."""
    network = random_network(backbone)
    groups = groups_of(network)
    branches = [group.branch for group in groups if group.branch]
    costs = []
    for gone in (set(), {branches[-1]}, set(branches)):
        model = copy.deepcopy(network)
        masks = [(torch.arange(g.size) % 3 > 0) & (g.branch not in gone) for g in groups]
        silence(model, masks)
        compact = cut(model, masks, mean_inputs(model, [images]))
        with torch.inference_mode():
            expected = model(images)
            assert (expected - compact(images)).abs().max() < 1e-9
        path = tmp_path / "cut"
        save_checkpoint(path, Checkpoint(compact, Charset("0123456789"), 160, "prune"))
        loaded = load_checkpoint(path).model
        with torch.inference_mode():
            assert torch.equal(loaded(images), compact(images))
        assert len(groups_of(loaded)) == len(groups) - len(gone)
        costs.append((macs(loaded), parameters(loaded)["total"], path.stat().st_size))
    assert all(a > b for more, fewer in pairwise(costs) for a, b in zip(more, fewer, strict=True))


def test_what_is_left_of_a_branch_learns_is_exported_and_is_not_cut_again(
    images: Tensor, tmp_path: Path
) -> None:
    network = random_network("mobilenetv3_small_100")
    compact = cut(network, [torch.full((g.size,), not g.branch) for g in groups_of(network)])
    constants = [layer.constant for layer in shortcuts_of(compact)]
    assert len(constants) == 6
    compact.train()(images).square().sum().backward()
    assert all(constant.grad.any() for constant in constants if constant.grad is not None)
    assert all(constant.grad is not None for constant in constants)
    checkpoint = Checkpoint(compact.float().eval(), Charset("0123456789"), 160, "finetune")
    export_onnx(tmp_path / "model.onnx", checkpoint, ExportSettings(), {})
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 96, 3), dtype=np.uint8)
    found = load_exported(tmp_path / "model.onnx").probabilities(pixels)
    assert np.abs(found - reader_of(checkpoint).probabilities(pixels)).max() < 1e-4
    with pytest.raises(SettingsError, match="one whose branches have gone in a cut"):
        refuse_uncuttable(compact)


@pytest.mark.parametrize("backbone", ["vgg13", "ghostnet_100", "repvgg_a0", "seresnet34"])
def test_branches_that_would_leave_more_than_a_constant_are_none(backbone: str) -> None:
    assert all(group.branch is None for group in groups_of(random_network(backbone)))


@pytest.mark.parametrize("backbone", ["repvgg_a0", "mobileone_s0", "repvit_m1"])
def test_the_deployed_form_of_a_cut_agrees_and_is_smaller(images: Tensor, backbone: str) -> None:
    model = random_network(backbone)
    compact = cut(model, keep_masks(absolute_gammas(model), 0.5, PruneSettings()))
    shipped = deployed(compact)
    assert shipped is not None
    assert not norms_of(shipped)
    with torch.inference_mode():
        assert (shipped(images) - compact(images)).abs().max() < 1e-9
    assert macs(shipped) < macs(compact)
    checkpoint = Checkpoint(compact, Charset("0123456789"), 160, "finetune")
    assert COSTS["macs"](checkpoint) == macs(shipped), "what is asked for is what ships"
    assert COSTS["params"](checkpoint) == parameters(shipped)["total"]


def test_a_network_without_branches_for_training_ships_as_it_is() -> None:
    assert deployed(random_network("vgg13")) is None
    assert deployed(random_network("mobilenetv3_small_100")) is None


def test_what_can_be_cut_is_proven(network: Recogniser) -> None:
    refuse_uncuttable(network)


def test_convolutions_over_channels_are_proven_with_what_they_run_over_kept() -> None:
    refuse_uncuttable(random_network("eca_resnet33ts"))


def test_a_convolution_keeps_its_kernel_where_its_stride_is_changed() -> None:
    layers = [m for m in random_network("efficientnet_x_b3").modules() if isinstance(m, nn.Conv2d)]
    assert any(layer.stride == (2, 1) and layer.kernel_size == (2, 2) for layer in layers)
    assert all(layer.kernel_size == layer.weight.shape[2:] for layer in layers)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_100", "ghostnet_100"])
def test_the_deepest_cut_has_the_same_groups_and_can_be_cut_again(backbone: str) -> None:
    network = random_network(backbone)
    groups = groups_of(network)
    masks = [torch.arange(group.size) == 0 for group in groups]
    narrow = cut(network, masks)
    assert [group.name for group in groups_of(narrow)] == [group.name for group in groups]
    refuse_uncuttable(narrow)


def test_a_channel_that_no_norm_scales_alone_is_refused() -> None:
    network = random_network("hgnetv2_b0")  # Adds a learned number behind each ReLU.
    with (
        pytest.warns(UserWarning, match="Unwrapped parameters"),
        pytest.raises(SettingsError, match=r"hgnetv2_b0 cannot be cut: .* logits change by"),
    ):
        refuse_uncuttable(network)


def test_what_the_graph_stumbles_over_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"cs3darknet_s cannot be cut: .* coupled as no rule"):
        refuse_uncuttable(random_network("cs3darknet_s"))
