"""What the table of a frontier does not say by itself, in sentences.

Whether slimming was worth it, each slimmed network against its controls, and where it was timed.
"""

from collections.abc import Mapping, Sequence, Set

from crnn.metrics import Estimate, difference_interval, paired_difference
from flows.rows import ACCURACY, BASELINE, CONTROLS, Row, Variant, with_ends

AHEAD = "ahead/"
"""Before a rival in the name of a difference of word accuracies: how far a point is ahead of it."""


def with_differences(rows: Sequence[Row], shipped: Sequence[Sequence[Variant]]) -> list[Row]:
    """The rows, with how far each network is ahead of the baseline and of its controls.

    Args:
        rows: Of one frontier.
        shipped: Its networks, of each seed; those without a file for other runtimes have no list
            of the lines that they read wrongly, and so no difference.
    """
    wrong = {
        networks[0].point: [network.wrong for network in networks]
        for networks in zip(*shipped, strict=True)
        if networks[0].exported
    }
    return [{**row, **_differences(row, wrong)} for row in rows]


def _differences(row: Row, wrong: Mapping[str, Sequence[Set[int]]]) -> Row:
    point, figures = row["point"], Row()
    rivals = {BASELINE: BASELINE, **{kind: f"{kind} {point}" for kind in CONTROLS}}
    for rival, name in rivals.items():
        if point in wrong and name in wrong and name != point:
            ahead = paired_difference(wrong[point], wrong[name], row["val/samples"])
            figures |= dict(zip(with_ends(f"{AHEAD}{rival}"), ahead, strict=True))
    return figures


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
        against = [_against(slimmed, kind, row) for kind, row in controls.items() if row]
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
    share, low, high = _estimate(row, ACCURACY)
    return f"{100 * share:.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def over_baseline(row: Row) -> str:
    """How many points a network is ahead of the baseline, with the 95% interval; - if unknown."""
    if f"{AHEAD}{BASELINE}" not in row:
        return "-"
    difference, low, high = (100 * share for share in _estimate(row, f"{AHEAD}{BASELINE}"))
    return f"{difference:+.1f} ({low:.1f} to {high:.1f})"


def _estimate(row: Row, name: str) -> Estimate:
    share, low, high = (row[key] for key in with_ends(name))
    return share, low, high


def _against(slimmed: Row, kind: str, control: Row) -> str:
    """A control's accuracy, and how far slimming is from it.

    Where the lines that each reads wrongly are not known, the interval is that of independent
    samples, which is too wide: both networks read the same lines.
    """
    if f"{AHEAD}{kind}" in slimmed:
        difference, low, high = _estimate(slimmed, f"{AHEAD}{kind}")
    else:
        difference, low, high = difference_interval(
            _estimate(slimmed, ACCURACY), _estimate(control, ACCURACY)
        )
    chance = ", which may be chance" if low <= 0 <= high else ""
    if round(100 * difference, 1) == 0:
        place, chance = "level with it", ""
    elif difference > 0:
        place = f"ahead by {100 * difference:.1f} points"
    else:
        place, low, high = f"behind by {-100 * difference:.1f} points", -high, -low
    interval = f"({100 * low:.1f} to {100 * high:.1f})"
    return f"{CONTROLS[kind]} {accuracy(control)}: slimming is {place} {interval}{chance}"
