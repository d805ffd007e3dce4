"""Networks in 8 bits: smaller, much the same, and trained for it without a change of their form."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint
from crnn.data.batches import Lines, evaluation_batches
from crnn.export import export_onnx
from crnn.fake_quantization import fake_quantized, round_filters, round_head, round_input
from crnn.networks.deploy import deployed
from crnn.quantization import layers_of, quantize
from crnn.reading import load_exported
from crnn.settings import ExportSettings
from tests.conftest import give_head, random_recogniser


def pixels(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 255, (count, 32, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_network_in_8_bits_is_small_and_close(tmp_path: Path, normalise: bool) -> None:
    checkpoint = Checkpoint(random_recogniser(0.3).float().eval(), Charset("0123456789"), 160, "x")
    exact, whole, part = (tmp_path / f"{name}.onnx" for name in ("exact", "whole", "part"))
    export_onnx(exact, checkpoint, ExportSettings(normalise=normalise), {"ratio": 0.62})
    layers = layers_of(exact)
    assert len(layers) == 13, "ten convolutions, two LSTM layers, the head"
    quantize(exact, whole, [pixels(4, 64), pixels(4, 96)], layers)
    quantize(exact, part, [pixels(4, 64)], layers[:1])
    sizes = [path.stat().st_size for path in (exact, whole, part)]
    assert sizes[1] < 0.4 * sizes[0]
    assert sizes[1] < sizes[2] <= 1.02 * sizes[0]
    kinds = {node.op_type for node in onnx.load(whole).graph.node}
    assert "DynamicQuantizeLSTM" in kinds
    assert "LSTM" not in kinds
    stored = [tensor for tensor in onnx.load(whole).graph.initializer if list(tensor.dims) == [11]]
    assert [bias.data_type for bias in stored] == [onnx.TensorProto.FLOAT16]
    read, truth = load_exported(whole), load_exported(exact)
    assert read.provenance == {"ratio": 0.62}
    best, expected = (r.best_path(pixels(3, 80))[0] for r in (read, truth))
    assert 0 < np.abs(best - expected).mean() < 0.05


def test_all_matrices_of_a_head_with_rows_are_in_8_bits(tmp_path: Path) -> None:
    model = random_recogniser(0.3).float().eval()
    give_head(model, 3, 2)
    exact, rounded = tmp_path / "exact.onnx", tmp_path / "rounded.onnx"
    checkpoint = Checkpoint(model, Charset("0123456789"), 160, "x")
    export_onnx(exact, checkpoint, ExportSettings(), {})
    assert len(layers_of(exact)) == 15, "ten convolutions, two LSTM layers, three in the head"
    quantize(exact, rounded, [pixels(4, 64), pixels(4, 96)], layers_of(exact))
    tensors = onnx.load(rounded).graph.initializer
    stored = [list(t.dims) for t in tensors if t.data_type == onnx.TensorProto.INT8]
    assert all(shape in stored for shape in ([16, 2], [16, 3], [3, 11]))
    read, truth = (load_exported(path).best_path(pixels(3, 80))[0] for path in (rounded, exact))
    assert np.abs(read - truth).mean() < 0.05


def test_a_network_in_8_bits_computes_the_same_on_a_cpu_whose_sums_have_16(tmp_path: Path) -> None:
    checkpoint = Checkpoint(random_recogniser(0.3).float().eval(), Charset("0123456789"), 160, "x")
    exact, rounded = tmp_path / "exact.onnx", tmp_path / "rounded.onnx"
    export_onnx(exact, checkpoint, ExportSettings(), {})
    quantize(exact, rounded, [pixels(4, 64)], layers_of(exact))
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(rounded).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(weights) >= 13
    assert max(np.abs(weight.astype(int)).max() for weight in weights) == 64


def test_rounding_is_that_of_the_file() -> None:
    torch.manual_seed(0)
    weight, given = torch.randn(3, 40), torch.rand(2, 50) * 3
    of_rows = [row.abs().max() / 64 for row in weight]
    of_all = [weight.abs().max() / 64] * 3
    for found, scales in ((round_filters(weight), of_rows), (round_head(weight), of_all)):
        for row, exact, scale in zip(found, weight, scales, strict=True):
            assert torch.allclose(row / scale, (row / scale).round(), atol=1e-3)
            assert (row - exact).abs().max() <= scale / 2 + 1e-6
    assert len(round_input(given, training=True).unique()) <= 256
    assert (round_input(given, training=True) - given).abs().max() < given.max() / 255
    assert round_input(torch.zeros(2, 2), training=False).abs().max() == 0
    assert round_filters(torch.zeros(2, 2)).abs().max() == 0
    assert round_head(torch.zeros(2, 2)).abs().max() == 0


@pytest.mark.parametrize("backbone", ["repvgg_a0", "mobileone_s0"])
def test_branches_are_rounded_as_the_convolution_that_ships(backbone: str) -> None:
    model = random_recogniser(1.0, backbone=backbone).float().eval()
    shipped, keys = deployed(model), model.state_dict().keys()
    assert shipped is not None
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    with torch.inference_mode():
        exact = model(images)
        with fake_quantized(model), fake_quantized(shipped):
            assert model.state_dict().keys() == keys
            rounded = model(images)
            assert torch.allclose(rounded, shipped(images), atol=1e-4)
        assert (rounded - exact).abs().max() > 1e-3
        assert torch.equal(model(images), exact)


def test_the_padding_layers_of_timm_are_rounded_as_well() -> None:
    model = random_recogniser(1.0, backbone="tf_efficientnet_lite0").float().eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len({type(layer) for layer in layers}) == 2, "of torch, and of timm"
    with fake_quantized(model):
        for layer in layers:
            steps = layer.weight / (layer.weight.abs().flatten(1).amax(1) / 64).view(-1, 1, 1, 1)
            assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert model(torch.rand(1, 3, 32, 64)).isfinite().all()
    assert all(isinstance(layer.weight, nn.Parameter) for layer in layers)


def test_a_network_computes_as_in_8_bits_and_is_then_what_it_was(lines: Lines) -> None:
    model = random_recogniser().float().eval()
    images = next(iter(evaluation_batches(lines))).images.float() / 127.5 - 1
    kinds, names = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.no_grad():
        exact = model(images)
        with fake_quantized(model):
            rounded = model(images)
            assert list(model.state_dict()) == names
        again = model(images)
    assert torch.equal(exact, again)
    assert [type(m) for m in model.modules()] == kinds
    assert 0 < (exact - rounded).abs().mean() < 0.2 * exact.abs().mean()
    with fake_quantized(model):
        model(images).square().mean().backward()
    assert model.cnn[0].weight.grad is not None
    assert model.cnn[0].weight.grad.abs().max() > 0
