"""Whether slimming was worth it: each slimmed network against its controls, in a sentence."""

from collections.abc import Sequence

from crnn.metrics import Estimate, difference_interval
from flows.rows import ACCURACY, CONTROLS, Row


def comparisons(rows: Sequence[Row]) -> list[str]:
    """One sentence for each point that has controls.

    Args:
        rows: Of the frontier, each control's point named after its kind and the point it is for.
    """
    points = {row["point"]: row for row in rows}
    sentences = []
    for point, slimmed in points.items():
        controls = {kind: points.get(f"{kind} {point}") for kind in CONTROLS}
        against = [_against(slimmed, row, CONTROLS[kind]) for kind, row in controls.items() if row]
        if against:
            sentences.append(f"{point}: slimmed {accuracy(slimmed)}; {'; '.join(against)}.")
    return sentences


def accuracy(row: Row) -> str:
    """Word accuracy with its 95% interval, as a person reads it."""
    share, low, high = _estimate(row)
    return f"{100 * share:.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def _estimate(row: Row) -> Estimate:
    return row[ACCURACY], row[f"{ACCURACY}_low"], row[f"{ACCURACY}_high"]


def _against(slimmed: Row, control: Row, name: str) -> str:
    """A control's accuracy, and how far slimming is from it.

    The interval of the difference is that of independent samples. Both networks read the same
    lines, and what is hard for one is mostly hard for the other, so it is rather too wide.
    """
    difference, low, high = difference_interval(_estimate(slimmed), _estimate(control))
    chance = ", which may be chance" if low <= 0 <= high else ""
    if round(100 * difference, 1) == 0:
        place, chance = "level with it", ""
    elif difference > 0:
        place = f"ahead by {100 * difference:.1f} points"
    else:
        place, low, high = f"behind by {-100 * difference:.1f} points", -high, -low
    interval = f"({100 * low:.1f} to {100 * high:.1f})"
    return f"{name} {accuracy(control)}: slimming is {place} {interval}{chance}"
