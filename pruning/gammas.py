"""BatchNorm scales (gamma) of the channels that can be cut, and how they are distributed."""

import torch
from torch import Tensor, nn

from crnn.networks.recogniser import Recogniser
from pruning.coupling import Group, groups_of

NEAR_ZERO = 1e-3
"""A channel with |gamma| below this adds nearly a constant to what follows."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Every BatchNorm2d by its module name, in forward order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def widths(model: Recogniser) -> dict[str, int]:
    """Channels of every group, by its name, in forward order."""
    return {group.name: group.size for group in groups_of(model)}


def absolute_gammas(model: Recogniser) -> list[Tensor]:
    """The largest |gamma| of each channel, (C_i,) for every group.

    Where several BatchNorms scale a channel it is gone when all of them are zero.
    """
    norms = norms_of(model)
    return [_largest_gammas(group, norms) for group in groups_of(model)]


def _largest_gammas(group: Group, norms: dict[str, nn.BatchNorm2d]) -> Tensor:
    first = norms[group.name].weight.detach()
    largest = first.new_zeros(group.size)
    for name, channels in group.norms.items():
        gamma = norms[name].weight.detach().abs()
        largest.scatter_reduce_(0, channels.to(gamma.device), gamma, "amax")
    return largest


def gamma_statistics(model: Recogniser) -> dict[str, float]:
    """Quantiles of |gamma| over all channels, and the shares at and near zero."""
    values = torch.cat(absolute_gammas(model)).float().cpu()
    statistics = {f"gamma/q{round(100 * q):02d}": float(values.quantile(q)) for q in QUANTILES}
    statistics["gamma/share_near_zero"] = float((values < NEAR_ZERO).float().mean())
    statistics["gamma/share_zero"] = float((values == 0).float().mean())
    return statistics
