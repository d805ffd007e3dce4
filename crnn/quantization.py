"""An exported network in 8 bits: convolutions and head statically, the LSTM dynamically.

Jacob et al. 2018 (arXiv:1712.05877), by onnxruntime's quantizer: weights per output channel,
activations with ranges seen on calibration lines. What an LSTM sums over its frames is quantized
with ranges found as it runs. Layers that cost too much accuracy stay in float. Weights use 7 of
their 8 bits: an x86 CPU without VNNI adds products in pairs in 16 bits, where two of 8 bits
overflow, and would read worse than others what the same file holds.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.onnx_model import ONNXModel

from crnn.files import write_atomic
from crnn.reading import PIXELS, normalised

STATIC = ("Conv", "MatMul")
DYNAMIC = ("LSTM",)
"""Operations that are quantized, with fixed ranges and with those of each batch."""

BETWEEN = ("Relu", "MaxPool")
"""Operations behind a convolution that go along: its range is then that of what is left of it."""


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Batches one after another, as onnxruntime asks for them."""

    def __init__(self, name: str, batches: Sequence[np.ndarray]) -> None:
        self._batches = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def layers_of(path: Path) -> list[str]:
    """Names of the operations of an exported network that can be quantized, in their order."""
    return _layers(_loaded(path))


def _loaded(path: Path) -> onnx.ModelProto:
    """A network whose head is a product and a sum, which is what is fast in 8 bits."""
    network = ONNXModel(onnx.load(path))
    network.replace_gemm_with_matmul()
    loaded: onnx.ModelProto = network.model
    return loaded


def _layers(network: onnx.ModelProto) -> list[str]:
    return [node.name for node in network.graph.node if node.op_type in (*STATIC, *DYNAMIC)]


def quantize(
    path: Path, target: Path, batches: Sequence[np.ndarray], layers: Sequence[str]
) -> None:
    """Write an exported network in 8 bits.

    Args:
        path: The network in float.
        target: The network in 8 bits, with the same metadata.
        batches: Lines to calibrate with, pixels (N, 32, W, 3), uint8.
        layers: Names of the operations to quantize; the others stay in float.
    """
    network = _loaded(path)
    name = network.graph.input[0].name
    left = [layer for layer in _layers(network) if layer not in layers]
    with tempfile.TemporaryDirectory() as folder:
        static, whole = Path(folder) / "static.onnx", Path(folder) / "whole.onnx"
        quantize_static(
            network,
            static,
            _Calibration(name, [b if name == PIXELS else normalised(b) for b in batches]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*STATIC, *BETWEEN],
            nodes_to_exclude=left,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "TensorQuantOverrides": _one_scale_for_heads(network),
                # The mean of the batches' ranges: one odd line does not widen the grid for all.
                "CalibMovingAverage": True,
            },
        )
        quantize_dynamic(
            static,
            whole,
            op_types_to_quantize=list(DYNAMIC),
            nodes_to_exclude=left,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(whole)
    _halve_bias_of_head(quantized.graph)
    _strip(quantized.graph)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(network.metadata_props)
    write_atomic(target, quantized.SerializeToString(deterministic=True))


def _one_scale_for_heads(network: onnx.ModelProto) -> dict[str, list[dict[str, QuantType]]]:
    """Overrides for the weights of the head, whose thousands of outputs would each have a scale."""
    heads = [node for node in network.graph.node if node.op_type == "MatMul"]
    weights = {tensor.name for tensor in network.graph.initializer}
    return {
        name: [{"quant_type": QuantType.QInt8}]
        for node in heads
        for name in node.input[:2]
        if name in weights
    }


def _halve_bias_of_head(graph: onnx.GraphProto) -> None:
    """Store its thousands of numbers in 16 bits; the runtime widens them when it loads them."""
    added = {name for node in graph.node if node.op_type == "Add" for name in node.input}
    for bias in [t for t in graph.initializer if t.name in added and len(t.dims) == 1]:
        numbers = onnx.numpy_helper.to_array(bias)
        if numbers.dtype == np.float32:
            half = onnx.numpy_helper.from_array(numbers.astype(np.float16), f"half {bias.name}")
            widened = onnx.helper.make_node(
                "Cast", [half.name], [bias.name], to=onnx.TensorProto.FLOAT
            )
            graph.node.insert(0, widened)
            graph.initializer.remove(bias)
            graph.initializer.append(half)


def _strip(graph: onnx.GraphProto) -> None:
    """Take out of a graph what costs bytes and says nothing: shapes, zeros, long names."""
    del graph.value_info[:]  # The runtime infers them.
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
    signed = {tensor.name for tensor in graph.initializer if tensor.data_type in kinds}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and set(node.input[2:]) & signed:
            del node.input[2:]  # Weights and biases are symmetric: their zero is 0.
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    outside = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {}

    def shortened(name: str) -> str:
        return name if not name or name in outside else short.setdefault(name, f"{len(short):x}")

    for node in graph.node:
        node.name = ""
        node.input[:] = [shortened(name) for name in node.input]
        node.output[:] = [shortened(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = shortened(tensor.name)
