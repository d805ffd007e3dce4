"""Penalties that push BatchNorm scales towards zero while the network trains."""

import math

import torch
from torch import Tensor, nn

from crnn.networks.branches import last_norms
from crnn.networks.recogniser import INITIAL_GAMMA, Recogniser
from crnn.training import Penalty, Run
from pruning.coupling import Group, groups_of
from pruning.gammas import absolute_gammas, norms_of
from pruning.selection import ratio_of
from pruning.settings import SparseSettings

FLOOR = 0.06
"""Share of a layer's channels that `auto` never drives to zero, but with their whole branch."""


def floor_of(group: Group, settings: SparseSettings) -> int:
    """How many of a group's channels `auto` leaves alone."""
    return 0 if may_go(group, settings) else _last_channels(group)


def may_go(group: Group, settings: SparseSettings) -> bool:
    """Whether `auto` may take all channels of a group, which then are a branch."""
    return settings.drop_branches and group.branch is not None


def _last_channels(group: Group) -> int:
    return max(1, math.ceil(FLOOR * group.size))


def largest_target(model: Recogniser, settings: SparseSettings) -> float:
    """Highest target_ratio that `auto` reaches with a network."""
    groups = groups_of(model)
    channels = sum(group.size for group in groups)
    return ratio_of(channels - sum(floor_of(group, settings) for group in groups), channels)


class Subgradient(Penalty):
    """Add s x sign(gamma) to the gradient of gamma, as Network Slimming (arXiv:1708.06519).

    Under Adam the term is rescaled with the rest of the gradient, so that all scales shrink
    together and few come near zero.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @torch.no_grad()
    def before_step(self, run: Run, learning_rate: float, progress: float) -> None:
        for layer in norms_of(run.model).values():
            assert layer.weight.grad is not None
            layer.weight.grad.add_(layer.weight.sign(), alpha=self.strength)


class Proximal(Penalty):
    """Shrink |gamma| by learning rate x s after each step: the proximal operator of the L1 norm.

    ISTA (Beck and Teboulle 2009). Gives exact zeros under any optimizer.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @torch.no_grad()
    def after_step(self, run: Run, learning_rate: float, progress: float) -> None:
        for layer in norms_of(run.model).values():
            shrunk = (layer.weight.abs() - learning_rate * self.strength).clamp(min=0)
            layer.weight.copy_(layer.weight.sign() * shrunk)


class Polarization(Penalty):
    """Step down s x (t x sum |gamma| - sum |gamma - mean|), gamma kept in [0, 1].

    Zhuang et al. 2020 (Neuron-level Structured Pruning using Polarization Regularizer). Small
    gammas go to 0 and large ones to 1. Deviation: the step is learning rate x s times the
    subgradient, after the optimizer's, which under Adam would rescale it.
    """

    T = 1.2
    """Weight of the L1 norm beside the spread; the paper takes 1.0 to 1.4."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @torch.no_grad()
    def after_step(self, run: Run, learning_rate: float, progress: float) -> None:
        layers = norms_of(run.model).values()
        gammas = torch.cat([layer.weight for layer in layers])
        away = (gammas - gammas.mean()).sign()
        slope = self.T * gammas.sign() - away + away.mean()
        moved = (gammas - learning_rate * self.strength * slope).clamp(0, 1)
        for layer, gamma in zip(
            layers, torch.split(moved, [len(m.weight) for m in layers]), strict=True
        ):
            layer.weight.copy_(gamma)


class Auto(Penalty):
    """Fade a share of the channels to exact zeros, the least important first.

    The share grows on a cubic ramp (Zhu and Gupta 2017, arXiv:1710.01878) over the first part of
    the stage, the rest lets the survivors settle. A channel in the share has gamma and beta
    shrunk together, which fades what ReLU lets through and nothing else: a dead channel adds
    nothing, not even a constant, so that cutting it changes nothing. Channels rank by a running
    mean of |gamma x d loss / d gamma + beta x d loss / d beta|, the first-order change of the
    loss when the channel has faded (Molchanov et al. 2019, arXiv:1906.10771): |gamma| itself
    misleads, because a BatchNorm behind the next convolution undoes any common scale of a layer.
    Where several BatchNorms scale a channel their terms are summed, and all of them fade. The dead
    stay dead, the others are left alone, and every group keeps a floor.

    A branch that may go has none, but its last channels also stand for the branch: alone they would
    seem to matter nothing, as the BatchNorm that ends the branch undoes their scale. So each gets
    its share of how much the loss would change if the gammas of that BatchNorm went to zero.
    """

    RAMP = 0.7
    """Share of the stage over which channels are driven to zero."""

    FADE = 0.02
    """Share of the stage in which a channel with the initial gamma fades to zero, at most."""

    OUTRUN = 3
    """Taken off in learning rates, at least: more than Adam can put back."""

    DECAY = 0.99
    """Of the running mean of importance, each step."""

    def __init__(self, settings: SparseSettings) -> None:
        self.settings = settings

    @torch.no_grad()
    def before_step(self, run: Run, learning_rate: float, progress: float) -> None:
        """Update what channels and branches matter.

        run.memory["importance"], (sum of C_i,), is that of the channels, run.memory["branches"],
        (number of groups,), what each group does as a branch, 0 where it may not go as one.
        """
        groups, norms = groups_of(run.model), norms_of(run.model)
        now = {"importance": torch.cat([_fading(group, norms) for group in groups])}
        if self.settings.drop_branches:
            ends = last_norms(run.model)
            nothing = now["importance"].new_zeros(())
            now["branches"] = torch.stack(
                [_ending(norms[ends[g.branch]]) if g.branch else nothing for g in groups]
            )
        for name, value in now.items():
            before = run.memory.get(name, value)
            run.memory[name] = self.DECAY * before + (1 - self.DECAY) * value

    @torch.no_grad()
    def after_step(self, run: Run, learning_rate: float, progress: float) -> None:
        """Fade the channels that rank lowest now; what is left of them after the ramp goes.

        run.memory["deaths"], (sum of C_i,) int64, numbers the dead in their order from 1;
        run.memory["progress"] is that of the step before.
        """
        groups, norms = groups_of(run.model), norms_of(run.model)
        sizes = [group.size for group in groups]
        dead = _dead(run)
        importance = torch.where(dead, -1, run.memory["importance"])
        of_branches = run.memory.get("branches", torch.zeros(len(groups)))
        parts = zip(groups, torch.split(importance, sizes), of_branches, strict=True)
        ranked = torch.cat([self._protected(*part) for part in parts])
        share = self.settings.target_ratio * (1 - (1 - min(progress / self.RAMP, 1)) ** 3)
        count = min(math.floor(share * len(ranked) + 1e-9), int(ranked.isfinite().sum()))
        lowest = torch.zeros_like(dead)
        lowest[ranked.argsort(stable=True)[:count]] = True
        ramping = progress < self.RAMP
        passed = progress - float(run.memory.get("progress", torch.tensor(progress)))
        run.memory["progress"] = torch.tensor(progress, dtype=torch.float64)
        fading = max(INITIAL_GAMMA * passed / self.FADE, self.OUTRUN * learning_rate)
        amount = fading if ramping else math.inf
        for group, dying in zip(groups, torch.split(lowest, sizes), strict=True):
            for name, channels in group.norms.items():
                _shrink(norms[name], dying[channels.to(dying.device)], amount)
        self._number_the_dead(run, _dead(run), importance)

    def _number_the_dead(self, run: Run, dead: Tensor, importance: Tensor) -> None:
        """Of those that died in the same step the least important was first."""
        deaths = run.memory.setdefault("deaths", torch.zeros_like(dead, dtype=torch.long))
        new = (dead & (deaths == 0)).nonzero().flatten()
        new = new[importance[new].argsort(stable=True)]
        deaths[new] = deaths.max() + torch.arange(1, len(new) + 1, device=deaths.device)

    def _protected(self, group: Group, importance: Tensor, of_branch: Tensor) -> Tensor:
        """The group's importance, its last channels out of reach or with their share of a branch.

        Dead ones have -1, and stay where they are.
        """
        last = importance.argsort(descending=True, stable=True)[: _last_channels(group)]
        raised = importance.clone()
        if may_go(group, self.settings):
            live = last[importance[last] >= 0]
            raised[live] += of_branch / max(1, len(live))
        else:
            raised[last] = math.inf
        return raised


def _dead(run: Run) -> Tensor:
    """Which channels have no gamma left, (sum of C_i,)."""
    return torch.cat(absolute_gammas(run.model)) == 0


def _fading(group: Group, norms: dict[str, nn.BatchNorm2d]) -> Tensor:
    """First-order change of the loss if each channel's gammas and betas went to zero, (C,)."""
    change = norms[group.name].weight.new_zeros(group.size)
    for name, channels in group.norms.items():
        gamma, beta = norms[name].weight, norms[name].bias
        assert gamma.grad is not None
        assert beta.grad is not None
        change.index_add_(0, channels.to(change.device), gamma * gamma.grad + beta * beta.grad)
    return change.abs()


def _ending(norm: nn.BatchNorm2d) -> Tensor:
    """First-order change of the loss if a branch that this BatchNorm ends gave its beta alone."""
    assert norm.weight.grad is not None
    return (norm.weight * norm.weight.grad).sum().abs()


def _shrink(norm: nn.BatchNorm2d, dying: Tensor, amount: float) -> None:
    """Take `amount` off |gamma| where it dies, (n,) boolean, and the same share off beta."""
    size = norm.weight.abs()
    left = torch.where(size > 0, (size - amount).clamp(min=0) / size, 0)
    norm.weight.mul_(torch.where(dying, left, 1))
    norm.bias.mul_(torch.where(dying, left, 1))


def penalty_of(settings: SparseSettings) -> Penalty:
    """The penalty the settings ask for."""
    if settings.method == "auto":
        return Auto(settings)
    assert settings.strength is not None  # The settings see to it.
    penalties = {"proximal": Proximal, "subgradient": Subgradient, "polarization": Polarization}
    return penalties[settings.method](settings.strength)
