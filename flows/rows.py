"""Rows of the frontier: a point's figures, collected from its stages and averaged over seeds."""

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from crnn.metrics import wilson_interval
from flows import project
from flows.cache import Manifest

ACCURACY = "val/word_accuracy"

CONTROLS = {"scratch": "the same architecture from scratch", "small": "an uncut network as small"}
"""What each kind of control is."""

Row = dict[str, Any]


def row_of(
    point: str, stages: Mapping[str, Manifest], exported: Manifest | None, cost: Manifest
) -> Row:
    """One point of one seed: what was cut, what it reads, what it costs.

    Args:
        point: Its name.
        stages: The stages behind it, the one that made the network last.
        exported: Its export stage, or None.
        cost: Its measure stage.
    """
    model = list(stages.values())[-1]
    behind = {**stages, **({"export": exported} if exported else {}), "measure": cost}
    kind = {"control": model.stage} if model.stage in CONTROLS else {}
    wish = stages["target"].metrics if "target" in stages else {}
    scores = {n: v for n, v in model.metrics.items() if n.startswith(("val/", "control/"))}
    return {
        "point": point,
        **kind,
        **_cut_figures(model, stages.get("prune")),
        **wish,
        **scores,
        **cost.metrics,
        "checkpoint": _place(model),
        **({"onnx": _place(exported), **_named(exported, "export/")} if exported else {}),
        "stages": {name: stage.key for name, stage in behind.items()},
    }


def _named(manifest: Manifest, prefix: str) -> dict[str, float]:
    return {name: value for name, value in manifest.metrics.items() if name.startswith(prefix)}


def _place(manifest: Manifest) -> str:
    """Where the result of a stage is, from the state folder."""
    return str(manifest.file(manifest.result).relative_to(project.home()))


def _cut_figures(model: Manifest, pruned: Manifest | None) -> dict[str, float]:
    """What was cut. An uncut network that is small lacks channels, but no ratio was cut."""
    if model.stage == "small":
        return {}
    if pruned is None:
        return {"prune/ratio_requested": 0.0, "prune/ratio_achieved": 0.0}
    figures = {n: v for n, v in pruned.metrics.items() if n.startswith("prune/")}
    if model.stage in CONTROLS:
        names = ("prune/ratio_requested", "prune/ratio_achieved", "prune/channels_kept")
        return {name: figures[name] for name in names}
    return {**figures, "prune/word_accuracy_untuned": pruned.metrics[ACCURACY]}


def mean_of_seeds(rows: Mapping[int, Row]) -> Row:
    """One row for a point that was computed with several seeds.

    Figures are means. `val/word_accuracy_std` is the sample standard deviation over the seeds, and
    what each seed came to is under "seeds". The checkpoint is that of the first seed.

    Args:
        rows: The point's row of each seed; of a single one it is returned as it is.
    """
    first = next(iter(rows.values()))
    if len(rows) == 1:
        return first
    means = {name: mean(row[name] for row in rows.values()) for name in _figures(first)}
    accuracies = [row[ACCURACY] for row in rows.values()]
    low, high = interval_of_seeds(accuracies, means["val/samples"])
    return {
        **first,
        **means,
        f"{ACCURACY}_low": low,
        f"{ACCURACY}_high": high,
        f"{ACCURACY}_std": stdev(accuracies),
        **{f"{ACCURACY}_seed_{seed}": row[ACCURACY] for seed, row in rows.items()},
        "stages": _stages_of_seeds(rows),
        "seeds": {
            str(seed): {**_figures(row), "checkpoint": row["checkpoint"]}
            for seed, row in rows.items()
        },
    }


def interval_of_seeds(accuracies: list[float], lines: float) -> tuple[float, float]:
    """95% interval of the mean accuracy over seeds, for other lines and other seeds.

    All seeds read the same lines, so more seeds are not more lines: the variance of the mean is
    p (1 - p) / lines, from the lines, plus std^2 / seeds, from the seeds. It is the score interval
    (Wilson 1927) of the number of lines that alone would give this variance, the effective sample
    size (Kish 1965, Survey Sampling, section 8.2). Deviation: std is taken as known, though two or
    three seeds tell it roughly.

    Args:
        accuracies: Of each seed, at least two.
        lines: Number of val lines.
    """
    share = mean(accuracies)
    from_lines = share * (1 - share) / lines
    from_seeds = stdev(accuracies) ** 2 / len(accuracies)
    effective = lines * from_lines / (from_lines + from_seeds) if from_seeds else lines
    return wilson_interval(share, effective)


def _figures(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


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
