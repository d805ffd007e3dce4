"""The device to compute on, and the fast way to use it."""

import os
from contextlib import AbstractContextManager

import torch
from torch import nn


def best_device() -> torch.device:
    """A CUDA device where there is one, else the CPU; of several the one the launcher gave us.

    float32 is float32 there, where torch would take TF32, of 10 bits, for convolutions.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def autocast(model: nn.Module, precision: str) -> AbstractContextManager[None]:
    """bfloat16 for convolutions where that is faster.

    Args:
        model: The network that is to run.
        precision: "auto", or "float32" to switch it off.
    """
    device = next(model.parameters()).device
    enabled = precision == "auto" and _gains_from_bfloat16(model, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _gains_from_bfloat16(model: nn.Module, device: torch.device) -> bool:
    """Not on a CPU with depthwise convolutions, slower in it and most of the time of a network."""
    if device.type == "cpu" and any(
        isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in model.modules()
    ):
        return False
    return has_bfloat16(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def layout_of(model: nn.Module) -> torch.memory_format:
    """The layout to train the network in: channels_last, which is faster.

    Not on a CPU with a strided 1x1 convolution of fewer than 16 inputs, as RepVGG's first is: in
    that layout oneDNN writes past its buffer where it computes the gradient of the weights, which
    is then wrong, or the process hangs or dies (uxlfoundation/oneDNN#6035, torch 2.14).
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    return (
        torch.contiguous_format
        if on_cpu and any(_writes_past_its_buffer(layer) for layer in model.modules())
        else torch.channels_last
    )


def _writes_past_its_buffer(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.in_channels // layer.groups < 16
    )


def describe(device: torch.device) -> str:
    """Name, threads and precision of the device, for the log."""
    precision = "bfloat16" if has_bfloat16(device) else "float32"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' * (threads > 1)}, {precision}"
