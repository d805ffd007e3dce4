"""The frontier as table and plot."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crnn.files import write_atomic
from flows.comparison import accuracy, over_baseline, remarks
from flows.listing import ROWS
from flows.rows import ACCURACY, BASELINE, INT8, OVER_TORCH, Row, base_point, with_ends

if TYPE_CHECKING:  # The pipeline's own process does without torch.
    from pruning.readiness import Readiness

AXES = {
    "cost/params_total": "parameters",
    "cost/bytes": "bytes on disk",
    "cost/macs": "multiply-adds of one line of 32 x 128 px",
    "cost/latency_ms": "latency of one line on one CPU thread in torch, ms",
    "cost/onnx_latency_ms": "latency of one line on one CPU thread in onnxruntime, ms",
}

MARKS = {
    "baseline": ("s", "#1f77b4"),
    "slimmed": ("o", "#1f77b4"),
    "scratch": ("^", "#ff7f0e"),
    "small": ("v", "#2ca02c"),
    "int8": ("D", "#9467bd"),
}
"""Marker and colour of each kind of network."""

PALETTE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
"""Colour of one frontier after another, where several are compared."""

SPREAD = f"{ACCURACY}_std"
"""Where there are several seeds: how far they lie apart."""

REQUESTED = "target/requested"
"""What a point of prune.targets was to cost at most."""

RIDGE = 1.4
"""Height of the highest ridge, in rows: it may reach into the row above."""

SIZE = "cost/bytes"
"""What the table's Pareto set weighs against accuracy: bytes of the file that ships."""

MORE_LATENCIES = {"cost/latency_deployed_ms": "deployed", "cost/onnx_latency_ms": "ONNX"}
"""Columns for a network that ships with fewer layers than are trained, and for its export."""


def pareto(rows: Sequence[Row], cost: str = SIZE) -> list[bool]:
    """For each row: no other is at least as good in accuracy and cost, and better in one."""
    return [
        not any(
            other[cost] <= row[cost]
            and other[ACCURACY] >= row[ACCURACY]
            and (other[cost] < row[cost] or other[ACCURACY] > row[ACCURACY])
            for other in rows
        )
        for row in rows
    ]


def write_report(
    folder: Path,
    title: str,
    rows: Sequence[Row],
    details_of: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write frontier.csv, .md, .json, .png and report.html; those that show these rows stay.

    Args:
        folder: Where to.
        title: Of the plots and the page.
        rows: Of the frontier.
        details_of: What else the page shows, as flows.page has it.
    """
    data = json.dumps(rows, indent=1).encode()
    target = folder / ROWS
    shown: dict[str, Callable[[], bytes]] = {
        "frontier.csv": lambda: _csv(rows),
        "frontier.md": lambda: _markdown(rows),
        "frontier.png": lambda: _png(title, rows),
        "report.html": lambda: _page(title, rows, details_of()),
    }
    same = target.exists() and target.read_bytes() == data
    for name, content in shown.items():
        if not (same and (folder / name).exists()):
            write_atomic(folder / name, content())
    if not same:
        write_atomic(target, data)
    os.utime(folder)  # The newest sweep is the one that was asked for last.


def _csv(rows: Sequence[Row]) -> bytes:
    nested = ("stages", "seeds")
    names = list(dict.fromkeys(name for row in rows for name in row if name not in nested))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _markdown(rows: Sequence[Row]) -> bytes:
    header, cells = table_cells(rows)
    tables = [
        table for table in ((header, cells), cut_cells(rows), latency_cells(rows)) if table[1]
    ]
    sentences = (f"{sentence}\n" for sentence in remarks(rows))
    return "\n".join([*(_markdown_table(*table) for table in tables), *sentences]).encode()


def _markdown_table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cut_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what each cut did to word accuracy."""
    accuracies = ["before the cut", "after the cut", "fine-tuned"]
    header = ["cut", "live channels cut", *accuracies, "points over the baseline"]
    names = ("prune/word_accuracy_before", "prune/word_accuracy_untuned", ACCURACY)
    cells = [
        [
            row["point"],
            f"{row['prune/live_channels_removed']:.0f}",
            *(f"{100 * row[name]:.1f}%" for name in names),
            over_baseline(row),
        ]
        for row in rows
        if "prune/live_channels_removed" in row
    ]
    return header, cells


def latency_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what was timed: medians, quartiles, and how many times as fast."""
    prefix = "speedup/"
    timed = dict.fromkeys(
        name.removeprefix(prefix)
        for row in rows
        for name in row
        if name.startswith(prefix) and not name.endswith(OVER_TORCH)
    )
    header = [
        "point",
        "runtime",
        "threads",
        "lines x px",
        "ms (quartiles)",
        "as fast",
        "over torch",
    ]
    cells = []
    for row, name in product(rows, timed):
        if f"{prefix}{name}" not in row:
            continue
        runtime, shape, threads = name.split("_")
        median, low, high = (row[f"latency/{name}_{what}ms"] for what in ("", "low_", "high_"))
        gains = (row[f"{prefix}{name}"], row[f"{prefix}{name}{OVER_TORCH}"])
        times = f"{median:.2f} ({low:.2f}-{high:.2f})"
        case = [row["point"], runtime, threads.removesuffix("t"), shape, times]
        cells.append([*case, *(f"{gain:.1f}" for gain in gains)])
    return header, cells


def subject(title: str, rows: Sequence[Row]) -> str:
    """What the accuracies were taken of."""
    lines = dict.fromkeys(f"{row['val/samples']:.0f}" for row in rows)
    counts = sorted({len(row.get("seeds", "1")) for row in rows})
    seeds = f", means of {' or '.join(map(str, counts))} seeds" if counts != [1] else ""
    return f"{title}: {' or '.join(lines)} val lines{seeds}"


def axes_of(rows: Sequence[Row]) -> dict[str, str]:
    """The costs that every row has; of the two latencies the one of the file that ships."""
    names = {cost: name for cost, name in AXES.items() if all(cost in row for row in rows)}
    if "cost/onnx_latency_ms" in names:
        names.pop("cost/latency_ms", None)
    return names


def _kind(row: Row) -> str:
    if "int8" in row:
        return "int8"
    uncut = base_point(row["point"]).split()[-1] == BASELINE
    return str(row.get("control", "baseline" if uncut else "slimmed"))


def _frontiers(rows: Sequence[Row]) -> dict[str, str]:
    """The colour of each frontier, where several are compared."""
    names = dict.fromkeys(row["frontier"] for row in rows if "frontier" in row)
    return dict(zip(names, cycle(PALETTE), strict=False))


def _legend(rows: Sequence[Row]) -> str:
    names = {
        "baseline": "square: baseline",
        "scratch": "triangle up: the cut from scratch",
        "small": "triangle down: uncut and small",
        "int8": "diamond: in 8 bits",
    }
    kinds = {_kind(row) for row in rows}
    return "; ".join(name for kind, name in names.items() if kind in kinds)


def _png(title: str, rows: Sequence[Row]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels, costs = figure.subplots(2, 2).flat, axes_of(rows)
    for axes in panels[len(costs) :]:
        axes.remove()  # Frontiers that are compared need not all have been exported.
    for axes, (cost, name) in zip(panels, costs.items(), strict=False):
        _draw_panel(axes, rows, cost)
        axes.set(xscale="log", xlabel=name, ylabel="word accuracy, %")
        axes.margins(x=0.14)  # Names stand beside the points.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(
            EngFormatter() if max(r[cost] for r in rows) > 1000 else "{x:g}"
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    if frontiers := _frontiers(rows):
        title = f"{len(frontiers)} frontiers"
        lines = [Line2D([], [], color=color, label=name) for name, color in frontiers.items()]
        figure.legend(handles=lines, loc="outside lower center", ncols=3)
    figure.suptitle(f"{subject(title, rows)}, 95% intervals\n{_legend(rows)}; filled: Pareto")
    return _png_of(figure)


def _png_of(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_panel(axes: Any, rows: Sequence[Row], cost: str) -> None:
    best, frontiers = pareto(rows, cost), _frontiers(rows)
    for row, is_best in zip(rows, best, strict=True):
        color = frontiers[row["frontier"]] if frontiers else MARKS[_kind(row)][1]
        below, above = _interval(row)
        axes.errorbar(
            row[cost],
            100 * row[ACCURACY],
            yerr=[[below], [above]],
            fmt=MARKS[_kind(row)][0],
            color=color,
            mfc=color if is_best else "white",
            capsize=3,
            lw=1,
        )
        _name_point(axes, row, cost)
    front = sorted((r for r, b in zip(rows, best, strict=True) if b), key=lambda r: r[cost])
    heights = [100 * r[ACCURACY] for r in front]
    axes.plot([r[cost] for r in front], heights, "--", color="grey", lw=1)


def _name_point(axes: Any, row: Row, cost: str) -> None:
    """Write its name beside a point: of those in 8 bits, which have a mark of their own, left.

    Where frontiers are compared, colour and mark say the rest of it.
    """
    if "frontier" in row and _kind(row) == "baseline":
        return
    place = (row[cost], 100 * row[ACCURACY])
    name = row["point"].removeprefix(f"{row.get('frontier')} ").removesuffix(INT8)
    left = _kind(row) == "int8"
    offset, side = ((-5, -9), "right") if left else ((5, 4), "left")
    axes.annotate(name, place, offset, textcoords="offset points", ha=side, fontsize=8)


def _interval(row: Row) -> tuple[float, float]:
    """Distance from the accuracy down and up to the ends of its interval, in points."""
    share, low, high = (row[name] for name in with_ends(ACCURACY))
    return 100 * (share - low), 100 * (high - share)


def _of_first_seed(rows: Sequence[Row]) -> list[str]:
    if not any("seeds" in row for row in rows):
        return []
    return ["Curves, gammas, kept channels and lines that are read wrongly: the first seed's."]


def _page(title: str, rows: Sequence[Row], details: Mapping[str, Any]) -> bytes:
    from flows.page import page_of

    header, cells = table_cells(rows)
    figures = (*AXES, *with_ends(ACCURACY))
    shown = {
        "title": title,
        "subject": f"{subject(title, rows)}; word accuracy with 95% intervals",
        "sentences": [*remarks(rows), *_of_first_seed(rows)],
        "axes": {cost: name for cost, name in AXES.items() if any(cost in row for row in rows)},
        "size": SIZE,
        "table": {"header": header, "cells": cells},
        "rows": [
            {
                **{name: row[name] for name in figures if name in row},
                "point": row["point"],
                "kind": _kind(row),
                "frontier": row.get("frontier", title),
            }
            for row in rows
        ],
    }
    return page_of(shown, details)


def readiness_picture(verdict: "Readiness", epochs: Sequence[tuple[float, float]]) -> bytes:
    """Live and dead channels of each layer, and what reading cost on the way; a PNG file.

    Args:
        verdict: On the sparse network.
        epochs: Share of zeros and val word accuracy after each epoch, both in %.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    layers, reading = figure.subplots(1, 2)
    names, live = list(verdict.live), list(verdict.live.values())
    dead = [verdict.channels[name] - count for name, count in verdict.live.items()]
    layers.barh(names, live, color="tab:blue", label="live")
    layers.barh(names, dead, left=live, color="lightgrey", label="dead")
    layers.invert_yaxis()
    layers.set(xlabel="channels")
    layers.legend()
    reading.plot(*zip(*epochs, strict=True), "o-")
    if verdict.baseline_accuracy is not None:
        reading.axhline(100 * verdict.baseline_accuracy, ls="--", color="grey", label="baseline")
        reading.legend()
    reading.set(xlabel="zero gammas, %", ylabel="val word accuracy after each epoch, %")
    reading.grid(alpha=0.3)
    figure.suptitle(verdict.sentence, wrap=True)
    return _png_of(figure)


def gamma_ridges(layers: dict[str, np.ndarray], title: str) -> np.ndarray:
    """Distribution of |gamma| of each layer as ridge lines, (H, W, 3) uint8.

    Size and axes are the same for all epochs and runs of a network, so that they compare. A ridge
    is cut off where a bin has more than half of the layer's channels; the share that is exactly
    zero stands beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 0.35 * len(layers)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = np.linspace(0, 1, 41)
    for row, gammas in enumerate(layers.values()):
        shares = np.histogram(gammas.clip(0, 1), edges)[0] / len(gammas)
        heights = RIDGE * np.minimum(shares / 0.5, 1)
        axes.stairs(heights - row, edges, baseline=-row, fill=True, color=MARKS["slimmed"][1])
        axes.stairs(heights - row, edges, baseline=-row, color="white", lw=0.8)
        zero = f"{100 * float((gammas == 0).mean()):.0f}% zero"
        axes.text(0.99, 0.1 - row, zero, ha="right", va="bottom", fontsize=8)  # Within the axes.
    axes.set(xlabel="|gamma|, 1 and above in the last bin", title=title, xlim=(0, 1))
    axes.set_ylim(-len(layers) + 0.7, RIDGE + 0.1)
    axes.set_yticks(-np.arange(len(layers)), list(layers))
    axes.spines[["top", "right", "left"]].set_visible(False)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the frontier as a person reads it."""
    more = [figure for figure in MORE_LATENCIES if any(figure in row for row in rows)]
    spread, wishes = (any(name in row for row in rows) for name in (SPREAD, REQUESTED))
    header = [
        "point",
        "cut",
        *(["asked / got"] if wishes else []),
        "word accuracy (95%)",
        *(["SD of seeds"] if spread else []),
        "unseen",
        "NED",
        "params",
        "MACs",
        "size",
        "latency",
        *(MORE_LATENCIES[figure] for figure in more),
        "Pareto",
    ]
    cells = []
    for row in rows:
        unseen, cut = row.get(f"{ACCURACY}_unseen"), row.get("prune/ratio_achieved")
        cells.append(
            [
                row["point"],
                "-" if cut is None else f"{100 * cut:.1f}%",
                *([asked_and_got(row)] if wishes else []),
                accuracy(row),
                *([f"{100 * row[SPREAD]:.2f}" if SPREAD in row else "-"] if spread else []),
                "-" if unseen is None else f"{100 * unseen:.1f}%",
                f"{row['val/ned']:.3f}",
                f"{row['cost/params_total'] / 1e6:.3f} M",
                f"{row['cost/macs'] / 1e6:.1f} M",
                f"{row['cost/bytes'] / 1e6:.2f} MB",
                *(
                    f"{row[figure]:.2f} ms" if figure in row else "-"
                    for figure in ("cost/latency_ms", *more)
                ),
                "yes" if row["pareto"] else "",
            ]
        )
    return header, cells


def asked_and_got(row: Row) -> str:
    """What a target asked for, and what the search found for it; "-" of any other point."""
    names = (REQUESTED, "target/achieved")
    if REQUESTED not in row:
        return "-"
    return " / ".join(f"{row[n]:,.0f}" if row[n] >= 1000 else f"{row[n]:.4g}" for n in names)
