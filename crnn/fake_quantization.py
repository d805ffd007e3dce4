"""Training that feels the rounding to 8 bits (Jacob et al. 2018, arXiv:1712.05877, section 3).

Convolutions and the head round their inputs and weights in the forward pass as an int8 file
does; gradients pass straight through. The LSTM stays in float: its ranges are found as it runs, and
it loses least. The branches of a block of RepVGG or MobileOne round as the one convolution that
ships, folded with the statistics of their BatchNorms, which stay as they are. Deviation: an input's
range is that of its batch, not a running mean, so that a training has no state beside its weights.
"""

from collections.abc import Iterator
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


class _RoundedConv2d(nn.Conv2d):
    def forward(self, given: Tensor) -> Tensor:
        weight = round_filters(self.weight)
        output: Tensor = self._conv_forward(round_input(given, self.training), weight, self.bias)
        return output


class _RoundedLinear(nn.Linear):
    def forward(self, given: Tensor) -> Tensor:
        return F.linear(round_input(given, self.training), round_head(self.weight), self.bias)


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


ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _RoundedConv2d,
    nn.Linear: _RoundedLinear,
}


@contextmanager
def fake_quantized(model: Recogniser) -> Iterator[None]:
    """Inside, the network computes as if it were in 8 bits; its state dict is what it was.

    Args:
        model: Changed in place, and back again at the end.
    """
    exact = {rounded: kind for kind, rounded in ROUNDED.items()}
    layers = [layer for layer in model.modules() if type(layer) in ROUNDED]
    blocks = blocks_of(model)
    for layer in layers:
        layer.__class__ = ROUNDED[type(layer)]
    for block, shaped in blocks:
        block.reparam_conv = _RoundedBlock(block, shaped)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = exact[type(layer)]
        for block, _ in blocks:
            block.reparam_conv = None
