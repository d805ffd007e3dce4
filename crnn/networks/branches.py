"""Residual blocks that have lost their branch: the shortcut and a constant are left of them."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

LAST_NORMS = {
    "timm.models.resnet.BasicBlock": "bn2",
    "timm.models._efficientnet_blocks.InvertedResidual": "bn3",
}
"""By the class of a block, the BatchNorm that ends its branch. By name: timm takes seconds.

Those of GhostNet are not among them: behind the first BatchNorm of their second half a depthwise
convolution reads the border as well, so that a dead branch gives no constant.
"""


class Shortcut(nn.Module):
    """A residual block without its branch: (N, C, H, W) to (N, C', H', W').

    Attributes:
        constant: What the branch gave everywhere, (C',).
        downsample: What the block has on its shortcut, or None.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        channels = block.get_submodule(LAST_NORMS[_kind(block)]).num_features
        self.constant = nn.Parameter(torch.zeros(channels))
        self.downsample = getattr(block, "downsample", None)
        self.act2 = getattr(block, "act2", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        shortcut = self.downsample(images) if self.downsample else images
        output: Tensor = self.act2(shortcut + self.constant[:, None, None])
        return output

    def reset_parameters(self) -> None:
        """Begin as a block whose branch gives nothing."""
        nn.init.zeros_(self.constant)


def shortcuts_of(model: nn.Module) -> list[Shortcut]:
    """What is left of the blocks that have lost their branch."""
    return [module for module in model.modules() if isinstance(module, Shortcut)]


def last_norms(model: nn.Module) -> dict[str, str]:
    """For each residual block whose branch can go the BatchNorm that ends it, by their names."""
    found = {}
    for name, block in model.named_modules():
        if _kind(block) in LAST_NORMS and _adds_its_branch_unchanged(block):
            found[name] = f"{name}.{LAST_NORMS[_kind(block)]}"
    return found


def drop_branches(model: nn.Module, names: Collection[str]) -> None:
    """Replace those residual blocks that are named; their constants are 0 until they are set."""
    for name in last_norms(model):
        if name in names:
            model.set_submodule(name, Shortcut(model.get_submodule(name)))


def _kind(block: nn.Module) -> str:
    return f"{type(block).__module__}.{type(block).__qualname__}"


def _adds_its_branch_unchanged(block: Any) -> bool:
    """Whether there is a shortcut, and nothing between the last BatchNorm and the sum."""
    if hasattr(block, "has_skip"):
        return bool(block.has_skip) and block.conv_s2d is None
    return block.se is None
