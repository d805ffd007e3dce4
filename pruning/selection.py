"""Which channels stay: one global threshold over all layers, with floors and rounding."""

from collections.abc import Iterator, Sequence
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
    vanishing: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Keep the channels whose |gamma| ranks highest across all layers.

    Global threshold of Network Slimming (Liu et al. 2017, arXiv:1708.06519). Deviations: `exact`
    removes floor(N x ratio) channels, ties broken by layer and channel, where the `reference` code
    removes one more and all ties (among dead channels that `deaths` numbers there are none); every
    layer keeps its largest channels up to a floor, and under `exact` what a floor saves is taken
    elsewhere. What is vanishing loses its floor at once under `exact`, or not at all, where so many
    are no longer to go: then fewer go than asked for. Where widths are to be multiples of round_to,
    `exact` ranks and removes so many channels of a layer at once, and up to round_to - 1 fewer in
    all; as long as no more has to go than is dead and may go, it takes no live one along, and so
    even fewer.

    Args:
        gammas: One (C_i,) tensor for each group of channels, in forward order.
        prune_ratio: Share of all channels to remove, in [0, 1).
        settings: Selection rule, floors and rounding.
        deaths: Numbers of the channels in the order in which their gammas became zero, from 1;
            0 for the others. Of the dead, those that died first go first.
        vanishing: Which groups may be left without a channel; None for no one.

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
    sizes, lowest = [len(m) for m in magnitudes], _lowest(gammas, settings, vanishing)
    wanted, free = int(sum(sizes) * Decimal(str(prune_ratio))), sum(sizes) - sum(lowest)
    if wanted > free:
        raise SettingsError(
            f"prune ratio {prune_ratio} would remove {wanted} of {sum(sizes)} channels, but the"
            f" floors (prune.min_channels, prune.min_ratio, prune.round_to) allow {free}; the"
            f" largest ratio is {ratio_of(free, sum(sizes))}"
        )
    if settings.selection == "exact":
        widths = _exact(magnitudes, wanted, settings, lowest)
    else:
        widths = _reference(magnitudes, prune_ratio, lowest)
    return [_largest(m, width) for m, width in zip(magnitudes, widths, strict=True)]


def largest_ratio(
    gammas: Sequence[Tensor], settings: PruneSettings, vanishing: Sequence[bool] | None = None
) -> float:
    """Highest prune ratio of at most four decimals that keep_masks takes."""
    channels = sum(len(gamma) for gamma in gammas)
    return ratio_of(channels - sum(_lowest(gammas, settings, vanishing)), channels)


def ratio_of(count: int, channels: int) -> float:
    """Largest ratio of four decimals that removes at most so many channels."""
    return (-(-(count + 1) * 10_000 // channels) - 1) / 10_000


def _exact(
    magnitudes: list[Tensor], left: int, settings: PruneSettings, lowest: list[int]
) -> list[int]:
    """Widths of the layers once `left` channels, in the blocks that matter least, are gone."""
    widths = [len(m) for m in magnitudes]
    ranked = [m.sort(descending=True).values for m in magnitudes]
    dead = sum(int((m[low:] <= 0).sum()) for m, low in zip(ranked, lowest, strict=True))
    spare_live = settings.round_to > 1 and left <= dead
    blocks = sorted(_blocks(ranked, settings, lowest))
    for worth, layer, _, size in blocks:
        if size > left or (spare_live and worth > 0):
            break
        left -= size
        widths[layer] -= size
    return widths


def _blocks(
    ranked: list[Tensor], settings: PruneSettings, lowest: list[int]
) -> Iterator[tuple[float, int, int, int]]:
    """What may go: the worth of a block of channels, its layer, its negated place, its size.

    ranked has the magnitudes of each layer, the largest first: round_to a block, and the floor,
    where it may go, at once. Worth is the mean magnitude per channel. A block of dead channels
    alone is worth less than any other, and the less the earlier its last one died.
    """
    for layer, (magnitudes, low) in enumerate(zip(ranked, lowest, strict=True)):
        floor = _floor(len(magnitudes), settings)
        beyond = range(floor, len(magnitudes), settings.round_to)
        for place in [*beyond] if low else [0, *beyond]:
            block = magnitudes[place : max(floor, place + settings.round_to)]
            worth = float(block.clamp(min=0).mean()) or float(block[0])
            yield worth, layer, -place, len(block)


def _reference(magnitudes: list[Tensor], ratio: float, floors: list[int]) -> list[int]:
    """Index and strict comparison of the published code: one channel more goes, and all ties."""
    flat = torch.cat(magnitudes).sort().values
    threshold = flat[int(len(flat) * ratio)]
    pairs = zip(magnitudes, floors, strict=True)
    return [max(int((m > threshold).sum()), floor) for m, floor in pairs]


def _lowest(
    gammas: Sequence[Tensor], settings: PruneSettings, vanishing: Sequence[bool] | None
) -> list[int]:
    """Fewest channels that a cut may leave of each layer: none or its floor."""
    pairs = zip(gammas, vanishing or [False] * len(gammas), strict=True)
    return [
        0 if may_vanish and settings.selection == "exact" else _floor(len(gamma), settings)
        for gamma, may_vanish in pairs
    ]


def _floor(channels: int, settings: PruneSettings) -> int:
    """Fewest channels that a layer of so many keeps, as long as it is there."""
    share = (channels * Decimal(str(settings.min_ratio))).to_integral_value(ROUND_CEILING)
    fewest = max(settings.min_channels, int(share))
    return min(channels, -(-fewest // settings.round_to) * settings.round_to)


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest.

    Of equal ones the later channel counts as larger, as in the order that `exact` removes by.
    """
    mask = torch.zeros(len(magnitudes), dtype=torch.bool)
    mask[magnitudes.argsort(stable=True).flip(0)[:count]] = True
    return mask
