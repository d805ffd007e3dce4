"""BatchNorm scales (gamma): which are prunable, and how they are distributed."""

import torch
from torch import Tensor, nn

NEAR_ZERO = 1e-3
"""A channel with |gamma| below this adds nearly a constant to what follows."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def prunable(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Every BatchNorm2d by its module name, in forward order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def widths(model: nn.Module) -> dict[str, int]:
    """Channels of every prunable layer, by its module name, in forward order."""
    return {name: layer.num_features for name, layer in prunable(model).items()}


def absolute_gammas(model: nn.Module) -> list[Tensor]:
    """|gamma| of every prunable layer, (C_i,) each."""
    return [layer.weight.detach().abs() for layer in prunable(model).values()]


def share_zero(model: nn.Module) -> float:
    """Share of the channels whose gamma is exactly zero."""
    return float((torch.cat(absolute_gammas(model)) == 0).float().mean())


def gamma_statistics(model: nn.Module) -> dict[str, float]:
    """Quantiles of |gamma| over all channels, and the shares at and near zero."""
    values = torch.cat(absolute_gammas(model)).float().cpu()
    statistics = {f"gamma/q{round(100 * q):02d}": float(values.quantile(q)) for q in QUANTILES}
    statistics["gamma/share_near_zero"] = float((values < NEAR_ZERO).float().mean())
    statistics["gamma/share_zero"] = share_zero(model)
    return statistics
