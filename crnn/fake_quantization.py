"""Training that feels the rounding to 8 bits (Jacob et al. 2018, arXiv:1712.05877, section 3).

Convolutions and the head round their inputs and weights in the forward pass as an int8 file
does; gradients pass straight through. The LSTM stays in float: its ranges are found as it runs, and
it loses least. The branches of a block of RepVGG or MobileOne round as the one convolution that
ships, folded with the statistics of their BatchNorms, which stay as they are. Deviation: an input's
range is that of its batch, not a running mean, so that a training has no state beside its weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crnn.distributed import maximum
from crnn.networks.deploy import blocks_of
from crnn.networks.recogniser import Recogniser

LARGEST_WEIGHT, LARGEST_INPUT = 64, 255
SMALLEST_SCALE = 1e-8


def round_filters(weight: Tensor) -> Tensor:
    """A weight (C, ...) on a symmetric grid of 7 bits, with a scale for each of the C outputs."""
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = (largest / LARGEST_WEIGHT).clamp(min=SMALLEST_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, zero, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT
    )


def round_head(weight: Tensor) -> Tensor:
    """A weight on a symmetric grid of 7 bits, with one scale, as the file has for its head."""
    scale = (weight.detach().abs().amax() / LARGEST_WEIGHT).clamp(min=SMALLEST_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(
        weight, scale, zero, -LARGEST_WEIGHT, LARGEST_WEIGHT
    )


def round_input(given: Tensor, training: bool) -> Tensor:
    """An input on the grid of uint8 between its smallest value and its largest, 0 among them.

    In training these are of the whole batch; evaluation has other batches in each process.
    """
    given = given.float()
    low, high = given.detach().aminmax()
    ends = torch.stack([high, -low])
    high, minus_low = (maximum(ends) if training else ends).clamp(min=0)
    low = -minus_low
    scale = ((high - low) / LARGEST_INPUT).clamp(min=SMALLEST_SCALE)
    zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(given, scale, zero, 0, LARGEST_INPUT)


class _Rounded:
    """What rounds a layer's input and weight and leaves the rest to the layer, timm's as well."""

    round_weight: Callable[[Tensor], Tensor]

    @property
    def weight(self: Any) -> Tensor:
        """The layer's own, on its grid; nn.Module looks for a parameter only where this is not."""
        rounded: Tensor = type(self).round_weight(self._parameters["weight"])
        return rounded

    def forward(self: Any, given: Tensor) -> Tensor:
        """What the layer makes of its input on its grid."""
        output: Tensor = super().forward(round_input(given, self.training))  # type: ignore[misc]
        return output


class _RoundedConv2d(_Rounded):
    round_weight = staticmethod(round_filters)


class _RoundedLinear(_Rounded):
    round_weight = staticmethod(round_head)


class _RoundedBlock(nn.Module):
    """The convolution that a block of branches will be; no part of the state dict."""

    def __init__(self, block: Any, shaped: nn.Conv2d) -> None:
        super().__init__()
        self._of = (block, shaped)  # In a tuple they are no parts of this one.

    def forward(self, given: Tensor) -> Tensor:
        block, shaped = self._of
        kernel, bias = block._get_kernel_bias()
        given, kernel = round_input(given, self.training), round_filters(kernel)
        return F.conv2d(given, kernel, bias, shaped.stride, shaped.padding, groups=shaped.groups)


def _rounded(layer: nn.Module) -> type[Any]:
    """The class that makes a convolution or linear layer round, by the rule of its kind."""
    kind = type(layer)
    rule = _RoundedConv2d if isinstance(layer, nn.Conv2d) else _RoundedLinear
    return type(kind.__name__, (rule, kind), {})


@contextmanager
def fake_quantized(model: Recogniser) -> Iterator[None]:
    """Inside, the network computes as if it were in 8 bits; its state dict is what it was.

    Args:
        model: Changed in place, and back again at the end.
    """
    blocks = blocks_of(model)
    folded = {layer for block, _ in blocks for layer in block.modules()}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    exact = {layer: type(layer) for layer in layers if layer not in folded}
    for layer in exact:
        layer.__class__ = _rounded(layer)
    for block, shaped in blocks:
        block.reparam_conv = _RoundedBlock(block, shaped)
    try:
        yield
    finally:
        for layer, kind in exact.items():
            layer.__class__ = kind
        for block, _ in blocks:
            block.reparam_conv = None
