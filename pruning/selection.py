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
) -> list[Tensor]:
    """Keep the channels whose |gamma| ranks highest across all layers.

    Global threshold of Network Slimming (Liu et al. 2017, arXiv:1708.06519). Deviations: `exact`
    removes floor(N x ratio) channels, ties broken by layer and channel, where the `reference`
    code removes one more and all ties (among dead channels that `deaths` numbers there are none);
    every layer keeps its largest channels up to a floor, and under `exact` what a floor saves is
    taken elsewhere. Where widths are to be multiples of round_to, `exact` ranks and removes so many
    channels of a layer at once, and up to round_to - 1 fewer in all; as long as no more has to go
    than is dead and may go, it takes no live one along, and so even fewer.

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
    sizes = [len(m) for m in magnitudes]
    wanted, free = int(sum(sizes) * Decimal(str(prune_ratio))), _free(sizes, settings)
    if wanted > free:
        raise SettingsError(
            f"prune ratio {prune_ratio} would remove {wanted} of {sum(sizes)} channels, but the"
            f" floors (prune.min_channels, prune.min_ratio, prune.round_to) allow {free}; the"
            f" largest ratio is {ratio_of(free, sum(sizes))}"
        )
    if settings.selection == "exact":
        widths = _exact(magnitudes, wanted, settings)
    else:
        widths = _reference(magnitudes, prune_ratio, settings)
    return [_largest(m, width) for m, width in zip(magnitudes, widths, strict=True)]


def largest_ratio(gammas: Sequence[Tensor], settings: PruneSettings) -> float:
    """Highest prune ratio of at most four decimals that the floors of all layers allow."""
    sizes = [len(gamma) for gamma in gammas]
    return ratio_of(_free(sizes, settings), sum(sizes))


def ratio_of(count: int, channels: int) -> float:
    """Largest ratio of four decimals that removes at most so many channels."""
    return (-(-(count + 1) * 10_000 // channels) - 1) / 10_000


def _exact(magnitudes: list[Tensor], left: int, settings: PruneSettings) -> list[int]:
    """Widths of the layers once `left` channels, in the blocks that matter least, are gone."""
    widths = [len(m) for m in magnitudes]
    ranked = [m.sort(descending=True).values[_floor(len(m), settings) :] for m in magnitudes]
    dead = sum(int((m <= 0).sum()) for m in ranked)
    spare_live = settings.round_to > 1 and left <= dead
    blocks = sorted(_blocks(ranked, settings.round_to))
    for worth, layer, _, size in blocks:
        if size > left or (spare_live and worth > 0):
            break
        left -= size
        widths[layer] -= size
    return widths


def _blocks(ranked: list[Tensor], size: int) -> Iterator[tuple[float, int, int, int]]:
    """What may go: the worth of a block of channels, its layer, its negated place, its size.

    ranked has the magnitudes of each layer beyond its floor, the largest first. Worth is the mean
    magnitude per channel. A block of dead channels alone is worth less than any other, and the less
    the earlier its last one died.
    """
    for layer, magnitudes in enumerate(ranked):
        for place in range(0, len(magnitudes), size):
            block = magnitudes[place : place + size]
            worth = float(block.clamp(min=0).mean()) or float(block[0])
            yield worth, layer, -place, len(block)


def _reference(magnitudes: list[Tensor], ratio: float, settings: PruneSettings) -> list[int]:
    """Index and strict comparison of the published code: one channel more goes, and all ties."""
    flat = torch.cat(magnitudes).sort().values
    threshold = flat[int(len(flat) * ratio)]
    return [max(int((m > threshold).sum()), _floor(len(m), settings)) for m in magnitudes]


def _free(sizes: Sequence[int], settings: PruneSettings) -> int:
    """How many channels of layers of these sizes the floors let go."""
    return sum(sizes) - sum(_floor(size, settings) for size in sizes)


def _floor(channels: int, settings: PruneSettings) -> int:
    """Fewest channels that a layer of so many keeps."""
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
