"""How far a sparse network can be cut before anything is lost."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crnn.networks.recogniser import Recogniser
from pruning.coupling import groups_of
from pruning.gammas import NEAR_ZERO, absolute_gammas, widths
from pruning.selection import ratio_of
from pruning.settings import SparseSettings
from pruning.sparsity import floor_of

SLACK = 0.01
"""Word accuracy that a sparse network may lose and still count as having had channels to spare."""

REACHED = 0.99
"""Share of the channels to drive to zero that have to be there."""


@dataclass(frozen=True)
class Readiness:
    """The verdict on a sparse network.

    Attributes:
        sentence: All of it, in words.
        free_ratio: Largest prune ratio of four decimals that removes no live channel.
        accuracy: Val word accuracy of the network.
        baseline_accuracy: Of the network it was made from; None where there was none.
        live: Live channels of each group, by its name; none where a branch is dead as a whole.
        channels: All channels of each group.
        at_floor: Groups that are not allowed to lose more.
    """

    sentence: str
    free_ratio: float
    accuracy: float
    baseline_accuracy: float | None
    live: dict[str, int]
    channels: dict[str, int]
    at_floor: list[str]


def readiness(
    model: Recogniser, settings: SparseSettings, accuracy: float, baseline: float | None
) -> Readiness:
    """Judge a network at the end of its sparse stage.

    A channel with |gamma| under NEAR_ZERO counts as dead. At least one of a group always stays,
    except of a branch that may go; floors and rounding of a cut may keep more.

    Args:
        model: The network.
        settings: Of its sparse stage.
        accuracy: Its val word accuracy.
        baseline: That of the network it was made from, or None.
    """
    groups, gammas = groups_of(model), absolute_gammas(model)
    floors = {group.name: floor_of(group, settings) for group in groups}
    live = {
        group.name: max(min(1, floors[group.name]), int((gamma >= NEAR_ZERO).sum()))
        for group, gamma in zip(groups, gammas, strict=True)
    }
    channels = widths(model)
    total = sum(channels.values())
    dead = total - sum(live.values())
    free = ratio_of(dead, total)
    at_floor = [
        name
        for name, floor in floors.items()
        if settings.method == "auto" and 0 < live[name] <= floor < channels[name]
    ]
    gone = [str(group.branch) for group in groups if not live[group.name]]
    parts = [_cut_part(settings, free, dead, total)]
    parts += _accuracy_part(accuracy, baseline, free)
    parts += [f"branches that are dead as a whole: {', '.join(gone)}"] if gone else []
    parts += [f"at their floor: {', '.join(at_floor)}"] if at_floor else []
    if settings.method == "auto" and dead < REACHED * int(settings.target_ratio * total):
        parts.append(f"sparse.target_ratio {settings.target_ratio:g} was not reached")
    if dead == 0 and settings.method != "auto":
        parts.append("raise sparse.strength or take sparse.method auto")
    return Readiness("; ".join(parts), free, accuracy, baseline, live, channels, at_floor)


def live_removed(gammas: Sequence[Tensor], masks: Sequence[Tensor]) -> int:
    """How many channels a cut removes that still do something.

    Args:
        gammas: |gamma|, (C_i,) each.
        masks: True keeps, (C_i,) each.
    """
    pairs = zip(gammas, masks, strict=True)
    return sum(int((~mask & (gamma.cpu() >= NEAR_ZERO)).sum()) for gamma, mask in pairs)


def _cut_part(settings: SparseSettings, free: float, dead: int, channels: int) -> str:
    if dead == 0:
        return f"every cut takes live channels: none of {channels} is dead"
    if settings.method == "auto":
        return f"a cut of up to {free:g} is free: {dead} of {channels} channels are dead"
    return (  # The others leave a beta, which a zero-padded border does not let fold exactly.
        f"a cut of up to {free:g} takes hardly more than constants: {dead} of {channels} channels"
        f" have |gamma| under {NEAR_ZERO:g}"
    )


def _accuracy_part(accuracy: float, baseline: float | None, free: float) -> list[str]:
    if baseline is None:
        return [f"the network reads {100 * accuracy:.1f}% of the val lines"]
    if baseline == accuracy == 0:
        return ["neither this network nor the baseline reads a line: train longer"]
    lost = baseline - accuracy
    verdict = (
        "there is slack"
        if lost <= SLACK + 1e-9
        else f"there is no slack at {free:g}, and {100 * lost:.1f} points to regain in fine-tuning"
    )
    return [f"it reads {100 * accuracy:.1f}%, the baseline {100 * baseline:.1f}%: {verdict}"]
