"""Rows of the frontier: a point's figures, collected from its stages and averaged over seeds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from crnn.metrics import interval_of_seeds
from flows import project
from flows.cache import ERRORS, Manifest

ACCURACY = "val/word_accuracy"

BASELINE = "baseline"
"""Point of the uncut network."""

QAT, INT8 = " qat", " int8"
"""Behind the names of points: trained on for 8 bits; in 8 bits."""

OVER_TORCH = "_over_torch"
"""Behind the name of a speed-up: over the baseline in torch, not in the same runtime."""

TIMED = ("latency/", "speedup/")
"""Before the names of figures of a latency stage."""

TIMED_THREADS = (1, 2)
"""Numbers of CPU threads that latency is taken with, where there are so many cores."""

ONNX_LATENCY = "cost/onnx_latency_ms"

TRAINED, EXPORTED = "trained", "exported"
"""Before the name of a point: its checkpoint, and its file for other runtimes."""

CHAMPION, BEST = "champion", "best"
"""The present champion and the best point of a sweep, where they are timed beside each other."""

CONTROLS = {"scratch": "the same architecture from scratch", "small": "an uncut network as small"}
"""What each kind of control is."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A network in one of the forms in which it ships, of one seed.

    Attributes:
        point: Name of its point of the frontier.
        stages: The stages behind it, the one that made the network last.
        exported: Its file for other runtimes, an export or int8 stage; None: there is none.
    """

    point: str
    stages: dict[str, Manifest]
    exported: Manifest | None = None

    @property
    def model(self) -> Manifest:
        """The stage that made the network."""
        return list(self.stages.values())[-1]

    @property
    def label(self) -> str:
        """What a person calls it, by the stage that made it."""
        return f"int8 {self.model.label}" if self.is_int8 else self.model.label

    @property
    def wrong(self) -> frozenset[int]:
        """Indices of the val lines that its file for other runtimes reads wrongly."""
        assert self.exported
        errors = json.loads(self.exported.file(ERRORS).read_text(encoding="utf-8"))
        return frozenset(error["index"] for error in errors)

    @property
    def is_int8(self) -> bool:
        """Its file computes in 8 bits."""
        return self.exported is not None and self.exported.stage == "int8"


def with_ends(figure: str) -> tuple[str, str, str]:
    """Names of a figure and of the two ends of its 95% interval."""
    return figure, f"{figure}_low", f"{figure}_high"


def base_point(point: str) -> str:
    """The point whose network this is in another form."""
    return point.removesuffix(INT8).removesuffix(QAT)


def row_of(variant: Variant, cost: Manifest, times: Manifest) -> Row:
    """One point of one seed: what was cut, what it reads, what it costs.

    Args:
        variant: The network.
        cost: Its measure stage.
        times: The latency stage of its seed.
    """
    model, exported = variant.model, variant.exported
    control = next((name for name in variant.stages if name in CONTROLS), None)
    wished = "target" in variant.stages and not variant.is_int8  # Which costs something else.
    wish = variant.stages["target"].metrics if wished else {}
    row: Row = {
        "point": variant.point,
        **({"control": control} if control else {}),
        **_cut_figures(variant, control),
        **wish,
        **_named(model, "val/", "control/"),
        **cost.metrics,
        "checkpoint": _place(model),
        "timed_on": times.settings["timed_on"],
        "stages": {name: stage.key for name, stage in variant.stages.items()},
    }
    if exported:
        row |= {"onnx": _place(exported), **_named(exported, "export/", "quantize/")}
        row["stages"][exported.stage] = exported.key
    if exported and variant.is_int8:
        row |= {"int8": True, **_named(exported, "val/"), "cost/bytes": row["cost/onnx_bytes"]}
    row["stages"] |= {"measure": cost.key, "latency": times.key}
    return row | times_of(times)[variant.point]


def times_of(times: Manifest) -> dict[str, dict[str, float]]:
    """What a latency stage found, by point."""
    found: dict[str, dict[str, float]] = json.loads(times.file(times.result).read_text("utf-8"))
    return found


def _named(manifest: Manifest, *prefixes: str) -> dict[str, float]:
    return {name: value for name, value in manifest.metrics.items() if name.startswith(prefixes)}


def _place(manifest: Manifest) -> str:
    """Where the result of a stage is, from the state folder."""
    return str(manifest.file(manifest.result).relative_to(project.home()))


def _cut_figures(variant: Variant, control: str | None) -> dict[str, float]:
    """What was cut. An uncut network that is small lacks channels, but no ratio was cut."""
    pruned = variant.stages.get("prune")
    if control == "small":
        return {}
    if pruned is None:
        return {"prune/ratio_requested": 0.0, "prune/ratio_achieved": 0.0}
    figures = _named(pruned, "prune/")
    if control or variant.is_int8 or "qat" in variant.stages:  # The cut has a row of its own.
        names = ("prune/ratio_requested", "prune/ratio_achieved", "prune/channels_kept")
        return {name: figures[name] for name in names}
    return {**figures, "prune/word_accuracy_untuned": pruned.metrics[ACCURACY]}


def mean_of_seeds(rows: Mapping[int, Row]) -> Row:
    """One row for a point that was computed with several seeds.

    Figures are means. `val/word_accuracy_std` is the sample standard deviation over the seeds, and
    what each seed came to is under "seeds". Checkpoint and export are those of the first seed.

    Args:
        rows: The point's row of each seed; of a single one it is returned as it is.
    """
    first = next(iter(rows.values()))
    if len(rows) == 1:
        return first
    # Machines differ in what they can time: what was not timed for every seed is left out.
    common = set.intersection(*(set(figures_in(row)) for row in rows.values()))
    first = {n: v for n, v in first.items() if n in common or not n.startswith(TIMED)}
    means = {name: mean(row[name] for row in rows.values()) for name in figures_in(first)}
    accuracies = [row[ACCURACY] for row in rows.values()]
    low, high = interval_of_seeds(accuracies, means["val/samples"])
    return {
        **first,
        **means,
        f"{ACCURACY}_low": low,
        f"{ACCURACY}_high": high,
        f"{ACCURACY}_std": stdev(accuracies),
        "timed_on": "; ".join(dict.fromkeys(row["timed_on"] for row in rows.values())),
        **{f"{ACCURACY}_seed_{seed}": row[ACCURACY] for seed, row in rows.items()},
        "stages": _stages_of_seeds(rows),
        "seeds": {
            str(seed): {**figures_in(row), "checkpoint": row["checkpoint"]}
            for seed, row in rows.items()
        },
    }


def figures_in(row: Row) -> dict[str, float]:
    """The numbers of a row, by their names."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _stages_of_seeds(rows: Mapping[int, Row]) -> dict[str, str]:
    """Keys of all seeds' stages; those that every seed shares under their own name."""
    stages: dict[str, str] = {}
    for name in next(iter(rows.values()))["stages"]:
        keys = {seed: row["stages"][name] for seed, row in rows.items()}
        if len(set(keys.values())) == 1:
            stages[name] = next(iter(keys.values()))
        else:
            stages |= {f"{name}_seed_{seed}": key for seed, key in keys.items()}
    return stages
