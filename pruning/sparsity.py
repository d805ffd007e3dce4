"""Penalties that push BatchNorm scales towards zero while the network trains."""

import torch
from torch import nn

from crnn.training import Penalty
from pruning.gammas import prunable
from pruning.settings import SparseSettings


class Subgradient(Penalty):
    """Add s x sign(gamma) to the gradient of gamma, as Network Slimming (arXiv:1708.06519).

    Under Adam the term is rescaled with the rest of the gradient, so that all scales shrink
    together and few come near zero.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @torch.no_grad()
    def before_step(self, model: nn.Module, learning_rate: float, progress: float) -> None:
        for layer in prunable(model).values():
            assert layer.weight.grad is not None
            layer.weight.grad.add_(layer.weight.sign(), alpha=self.strength)


class Proximal(Penalty):
    """Shrink |gamma| by learning rate x s after each step: the proximal operator of the L1 norm.

    ISTA (Beck and Teboulle 2009). Gives exact zeros under any optimizer.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @torch.no_grad()
    def after_step(self, model: nn.Module, learning_rate: float, progress: float) -> None:
        for layer in prunable(model).values():
            shrunk = (layer.weight.abs() - learning_rate * self.strength).clamp(min=0)
            layer.weight.copy_(layer.weight.sign() * shrunk)


def penalty_of(settings: SparseSettings) -> Penalty:
    """The penalty the settings ask for."""
    kinds = {"subgradient": Subgradient, "proximal": Proximal}
    return kinds[settings.penalty](settings.strength)
