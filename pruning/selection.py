"""Which channels stay: one global threshold over all layers, with floors and rounding."""

from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from crnn.errors import SettingsError
from pruning.settings import PruneSettings


def keep_masks(
    gammas: Sequence[Tensor],
    prune_ratio: float,
    settings: PruneSettings,
    deaths: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Keep the channels whose |gamma| ranks highest across all layers.

    Global threshold of Network Slimming (Liu et al. 2017, arXiv:1708.06519). Deviations: `exact`
    removes floor(N x ratio) channels, ties broken by layer and channel, where the `reference`
    code removes one more and all ties; every layer keeps its largest channels up to a floor, and
    under `exact` what a floor saves is taken elsewhere.

    Args:
        gammas: One (C_i,) tensor for each group of channels, in forward order.
        prune_ratio: Share of all channels to remove, in [0, 1).
        settings: Selection rule, floors and rounding.
        deaths: Numbers of the channels in the order in which their gammas became zero, from 1;
            0 for the others. Of the dead, those that died first go first.

    Returns:
        One boolean (C_i,) mask for each group; True keeps the channel. A higher ratio keeps a
        subset of what a lower one keeps.

    Raises:
        SettingsError: prune_ratio outside [0, 1), or beyond what the floors allow.
    """
    if not 0 <= prune_ratio < 1:
        raise SettingsError(f"a prune ratio lies in [0, 1); {prune_ratio} does not")
    magnitudes = [gamma.detach().abs().double().cpu() for gamma in gammas]
    if deaths is not None:
        magnitudes = [
            torch.where(m > 0, m, -1 / (1 + order.cpu()))
            for m, order in zip(magnitudes, deaths, strict=True)
        ]
    protected = [_largest(m, _floor(len(m), settings)) for m in magnitudes]
    select = _exact if settings.selection == "exact" else _reference
    masks = [
        a | b for a, b in zip(select(magnitudes, protected, prune_ratio), protected, strict=True)
    ]
    return [
        _largest(m, _round_up(int(mask.sum()), settings.round_to), within=mask)
        for m, mask in zip(magnitudes, masks, strict=True)
    ]


def largest_ratio(gammas: Sequence[Tensor], settings: PruneSettings) -> float:
    """Highest prune ratio of at most four decimals that the floors of all layers allow."""
    sizes = [len(gamma) for gamma in gammas]
    free = sum(sizes) - sum(_floor(size, settings) for size in sizes)
    return _ratio(free, sum(sizes))


def _ratio(count: int, channels: int) -> float:
    """Largest ratio of four decimals that removes at most so many channels."""
    return int(Decimal(count) / channels * 10_000) / 10_000


def _exact(magnitudes: list[Tensor], protected: list[Tensor], ratio: float) -> list[Tensor]:
    flat, safe = torch.cat(magnitudes), torch.cat(protected)
    count = int(len(flat) * Decimal(str(ratio)))
    free = int((~safe).sum())
    if count > free:
        raise SettingsError(
            f"prune ratio {ratio} would remove {count} of {len(flat)} channels, but the floors"
            f" (prune.min_channels, prune.min_ratio) allow {free}; the largest ratio is"
            f" {_ratio(free, len(flat))}"
        )
    order = flat.argsort(stable=True)
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[order[~safe[order]][:count]] = False
    return list(torch.split(keep, [len(m) for m in magnitudes]))


def _reference(magnitudes: list[Tensor], protected: list[Tensor], ratio: float) -> list[Tensor]:
    """Index and strict comparison of the published code: one channel more goes, and all ties."""
    flat = torch.cat(magnitudes).sort().values
    threshold = flat[int(len(flat) * ratio)]
    return [m > threshold for m in magnitudes]


def _floor(channels: int, settings: PruneSettings) -> int:
    share = (channels * Decimal(str(settings.min_ratio))).to_integral_value(ROUND_CEILING)
    return min(channels, max(settings.min_channels, int(share)))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _largest(magnitudes: Tensor, count: int, within: Tensor | None = None) -> Tensor:
    """Mask of the `count` largest, the members of `within` before all others.

    Of equal ones the later channel counts as larger, as in the order that `exact` removes by.
    """
    score = magnitudes if within is None else magnitudes + within * (magnitudes.max() + 1)
    mask = torch.zeros(len(magnitudes), dtype=torch.bool)
    mask[score.argsort(stable=True).flip(0)[:count]] = True
    return mask
