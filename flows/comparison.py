"""What the table of a frontier does not say by itself, in sentences.

Whether slimming was worth it, each slimmed network against its controls, and where it was timed.
"""

from collections.abc import Sequence

from crnn.metrics import Estimate, difference_interval
from flows.rows import ACCURACY, CONTROLS, Row


def remarks(rows: Sequence[Row]) -> list[str]:
    """All sentences that belong under the table of a frontier."""
    return [*comparisons(rows), *_where_timed(rows)]


def comparisons(rows: Sequence[Row]) -> list[str]:
    """One sentence for each point that has controls.

    Args:
        rows: Of one frontier or several, each control's point named after its kind and the point
            it is for.
    """
    points = {_place(row): row for row in rows}
    sentences = []
    for (frontier, point), slimmed in points.items():
        controls = {kind: points.get((frontier, f"{kind} {point}")) for kind in CONTROLS}
        against = [_against(slimmed, row, CONTROLS[kind]) for kind, row in controls.items() if row]
        if against:
            name = slimmed["point"]
            sentences.append(f"{name}: slimmed {accuracy(slimmed)}; {'; '.join(against)}.")
    return sentences


def _place(row: Row) -> tuple[str, str]:
    """The frontier of a row, where there are several, and the name of its point there."""
    frontier = row.get("frontier", "")
    return frontier, row["point"].removeprefix(f"{frontier} ")


def _where_timed(rows: Sequence[Row]) -> list[str]:
    """CPU and runtimes; sweeps of earlier versions have none on record."""
    places = list(dict.fromkeys(row["timed_on"] for row in rows if "timed_on" in row))
    if len(places) > 1:
        return [f"The latencies do not compare, they are of different places: {'; '.join(places)}."]
    return [f"Timed on {place}." for place in places]


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
