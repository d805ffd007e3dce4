"""Convolutional networks of timm as backbones: any that can be made to keep the width of a line."""

import difflib
from types import MethodType
from typing import Any

import timm
import torch
from timm.models.ghostnet import GhostModule
from torch import Tensor, nn

from crnn.data.images import HEIGHT
from crnn.errors import SettingsError
from crnn.networks.vgg import STRIDE

PROBE_WIDTH = 64
"""Width in pixels of the line that a network is tried with."""

LATE = 4
"""From this input height on a stride may halve the width a second time.

The first one halves it as well; those between keep it, as in PP-OCR's recognisers, for a character
is only a few columns wide. Where it was halved at the first two, networks learnt far more slowly.
"""

ATTENTION = ("Bmm", "ScaledDotProduct")
"""In the names of an autograd graph, what lets every position look at every other."""

UNFIT = (AssertionError, AttributeError, RuntimeError, TypeError, ValueError)
"""What timm raises where a network cannot be built or run as it is needed here."""


class TimmBackbone(nn.Module):
    """Images (N, 3, 32, W) to the features (N, C, 1, W // STRIDE) of a timm network.

    Attributes:
        net: The network, without what comes behind its feature maps.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net.forward_features(images)  # type: ignore[operator]
        return features

    def strides(self) -> dict[str, str]:
        """Of every layer that has them. No weight holds them, and the name does not tell them."""
        return {n: str(m.stride) for n, m in self.net.named_modules() if hasattr(m, "stride")}


def timm_backbone(name: str) -> tuple[TimmBackbone, int]:
    """Build a network with fresh weights and make it fit for text lines.

    Of its strides the first and a late one halve the width, the others the height only; which ones
    these are is found by running it.

    Args:
        name: As timm knows it.

    Returns:
        The backbone and C, its number of output channels.

    Raises:
        SettingsError: There is no such network, or it cannot serve, and why.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)
        raise SettingsError(
            f"model.backbone is vgg13 or a network of timm; {name} is none, did you mean {near[0]}?"
        )
    try:
        net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")
    except UNFIT as error:
        raise _cannot_serve(name, f"timm cannot build it without its head: {error}") from error
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        raise _cannot_serve(name, "it has no BatchNorm, whose scales say what to cut")
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups != module.out_channels:
            raise _cannot_serve(name, "it has grouped convolutions that are not depthwise")
        if isinstance(module, GhostModule):
            _drop_idle_slice(name, module)
    backbone = TimmBackbone(net).eval()
    features = _fitted(name, backbone)
    return backbone, features.shape[1]


def _fitted(name: str, backbone: TimmBackbone) -> Tensor:
    """Patch strides and drop what is not used, by running a line; its features."""
    modules = {n: m for n, m in backbone.net.named_modules() if n}
    used: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=n: used.add(n)) for n, m in modules.items()]
    hooks += [
        m.register_forward_pre_hook(_keep_width) for m in modules.values() if hasattr(m, "stride")
    ]
    weight = next(backbone.parameters())
    image = torch.zeros(1, 3, HEIGHT, PROBE_WIDTH, device=weight.device)
    try:
        features: Tensor = backbone(image)
    except UNFIT as error:
        raise _cannot_serve(name, f"it does not run on lines {HEIGHT} px high: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(features, Tensor):
        raise _cannot_serve(name, "it gives several feature maps, and one is needed")
    if features.ndim != 4 or tuple(features.shape[2:]) != (1, PROBE_WIDTH // STRIDE):
        raise _cannot_serve(
            name,
            f"a line of {HEIGHT} x {PROBE_WIDTH} px becomes {tuple(features.shape[1:])}, and"
            f" (channels, 1, {PROBE_WIDTH // STRIDE}) is needed",
        )
    if any(word in operation for operation in _operations(features) for word in ATTENTION):
        raise _cannot_serve(name, "it has attention between positions")
    for n, module in backbone.net.named_children():
        if not any(u == n or u.startswith(f"{n}.") for u in used) and list(module.parameters()):
            setattr(backbone.net, n, nn.Identity())
    return features


def _keep_width(module: Any, inputs: tuple[Tensor, ...]) -> None:
    """Before a layer runs: let it halve the height alone, but for the first and a late one."""
    strides = module.stride if isinstance(module.stride, tuple) else (module.stride,) * 2
    if not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        return  # Its stride is not one over an image.
    height, width = inputs[0].shape[2:]
    may_halve = width > PROBE_WIDTH // STRIDE and (height == HEIGHT or height <= LATE)
    if strides[0] < 2 or may_halve:
        return
    module.stride = (strides[0], 1)
    pools = not isinstance(module, nn.Conv2d)
    if pools and getattr(module, "kernel_size", None) in (strides[0], strides):
        module.kernel_size = (strides[0], 1)  # Windows that did not overlap shall not begin to.


def _drop_idle_slice(name: str, module: Any) -> None:
    """Let a Ghost module give all its channels, which the slice behind them would only copy.

    The slice holds the uncut number of channels, and Torch-Pruning cannot follow it.
    """
    channels = sum(part[1].num_features for part in (module.primary_conv, module.cheap_operation))
    if channels != module.out_chs:
        raise _cannot_serve(
            name, f"a Ghost module throws away {channels - module.out_chs} channels"
        )
    module.forward = MethodType(_ghost, module)


def _ghost(module: Any, images: Tensor) -> Tensor:
    primary = module.primary_conv(images)
    return torch.cat([primary, module.cheap_operation(primary)], dim=1)


def _operations(output: Tensor) -> set[str]:
    """Names of all operations that made a tensor, from its autograd graph."""
    names, seen, stack = set(), set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            stack += [function for function, _ in node.next_functions]
    return names


def _cannot_serve(name: str, reason: str) -> SettingsError:
    return SettingsError(f"model.backbone {name} cannot serve: {reason}")
