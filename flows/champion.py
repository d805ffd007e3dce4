"""The best point of a frontier, named in MLflow's registry and ready to be served."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from crnn.data.sources import open_source
from crnn.files import sha256
from flows import project, registry
from flows.cache import LINES
from flows.comparison import accuracy
from flows.experiment import ChampionSettings, Experiment
from flows.rows import ACCURACY, ONNX_LATENCY, Row
from flows.tracking import Tracker

RULES: dict[str, Callable[[Row], tuple[float, float]]] = {
    "smallest": lambda row: (file_bytes(row), -row[ACCURACY]),
    "fastest": lambda row: (row[ONNX_LATENCY], -row[ACCURACY]),
    "most_accurate": lambda row: (-row[ACCURACY], file_bytes(row)),
}
"""What each rule makes small."""


class Crowned(NamedTuple):
    """What became of the alias.

    Attributes:
        sentence: For a person.
        is_new: Another model bears it now.
    """

    sentence: str
    is_new: bool = False


def crown(
    experiment: Experiment,
    tracker: Tracker,
    rows: Sequence[Row],
    sweep_run: str | None,
    figures_of: Callable[[registry.Champion, Row], Row | None],
) -> Crowned:
    """Give the alias to the best point of a sweep, if it beats the champion that there is.

    Args:
        experiment: Its name is the registered model's; it has the rule.
        tracker: Where MLflow is asked.
        rows: Of the frontier, the baseline first.
        sweep_run: MLflow run of the sweep, or None where MLflow could not be reached.
        figures_of: Figures of the present champion, to be compared with those of a row; None where
            its file is needed for that and not here.
    """
    settings = experiment.champion
    if not settings or not experiment.export:
        return Crowned("no champion: the experiment has no champion or no export section")
    best = best_of(rows, settings)
    if best is None:
        return Crowned("no champion: no exported point is small and close to the baseline enough")
    reigning = tracker.ask(registry.current, experiment.name) if sweep_run else None
    if reigning and (reason := _stays(reigning, best, rows[0], settings, figures_of)):
        name = f"version {reigning.version} of {experiment.name}"
        return Crowned(f"{name} stays champion: {reason}")
    version = None
    if sweep_run:
        candidate = _candidate(experiment, tracker, best, sweep_run)
        version = tracker.ask(registry.promote, candidate)
    if version is None:
        return Crowned(f"no new champion, as MLflow cannot be reached; the best is {_told(best)}")
    before = f", in place of version {reigning.version}" if reigning else ""
    name = f"version {version} of {experiment.name}"
    return Crowned(f"{name} is champion: {_told(best)}{before}", is_new=True)


def _stays(
    reigning: registry.Champion,
    best: Row,
    baseline: Row,
    settings: ChampionSettings,
    figures_of: Callable[[registry.Champion, Row], Row | None],
) -> str | None:
    """Why the champion stays what it is; None where the best point takes its place."""
    if reigning.by_hand:
        return "somebody gave it the alias by hand"
    if sha256(project.home() / best["onnx"]) == reigning.digest:
        return f"it is {_told(best)}"
    figures = figures_of(reigning, best)
    if figures is None:
        return "it has to be measured anew, and its file is not here"
    if is_eligible(figures, baseline, settings) and not beats(best, figures, settings):
        return f"it has {_figures(figures)}, the best point of this sweep is {_told(best)}"
    return None


def best_of(rows: Sequence[Row], settings: ChampionSettings) -> Row | None:
    """The point that a rule names best; None where none is good enough.

    Args:
        rows: Of a frontier, the baseline first.
        settings: The rule.
    """
    eligible = [row for row in rows if "onnx" in row and is_eligible(row, rows[0], settings)]
    return min(eligible, key=RULES[settings.rule], default=None)


def is_eligible(row: Row, baseline: Row, settings: ChampionSettings) -> bool:
    """Whether a network is good enough, and small enough, to be champion at all."""
    lost = 100 * (baseline[ACCURACY] - row[ACCURACY])
    accurate = settings.rule == "most_accurate" or lost <= settings.within + 1e-9
    small = file_bytes(row) <= 1e6 * (settings.max_mb or math.inf)
    return bool(accurate and small and row[ACCURACY] > 0)


def file_bytes(row: Row) -> float:
    """Size of the file that a point ships: of several seeds', the first one's."""
    return float(_of_file(row)["cost/onnx_bytes"])


def _of_file(row: Row) -> Row:
    """Figures of the network whose file a point ships; the row itself where there is one seed."""
    return next(iter(row.get("seeds", {"": row}).values()))


def beats(row: Row, figures: Row, settings: ChampionSettings) -> bool:
    """Whether a point is better than a champion that was measured on the same lines."""
    rank = RULES[settings.rule]
    return rank(row) < rank(figures)


def _told(row: Row) -> str:
    return f"{row['point']} with {_figures(row)}"


def _figures(row: Row) -> str:
    return f"{accuracy(row)}, {file_bytes(row) / 1e6:.2f} MB, {row[ONNX_LATENCY]:.2f} ms"


def _candidate(
    experiment: Experiment, tracker: Tracker, row: Row, sweep_run: str
) -> registry.Candidate:
    onnx = project.home() / row["onnx"]
    run = tracker.ask(tracker.point_run, sweep_run, row["point"]) or sweep_run
    card = model_card(experiment, row, sha256(onnx))
    example = _first_val_line(experiment, project.stages_folder() / row["stages"]["data"] / LINES)
    shipped = {**row, "cost/onnx_bytes": file_bytes(row)}
    return registry.Candidate(experiment.name, shipped, onnx, run, card, example)


def _first_val_line(experiment: Experiment, usable: Path) -> bytes:
    """An image file, the example of an input: the first line of the data stage's index."""
    with safe_open(usable, "np") as index:
        first = int(index.get_slice("val_indices")[:1][0])
    buffer = io.BytesIO()
    open_source(experiment.data, "val", experiment.seed).image(first).save(buffer, "png")
    return buffer.getvalue()


def model_card(experiment: Experiment, row: Row, digest: str) -> str:
    """What whoever uses a model has to know, in Markdown."""
    data, given = experiment.data, experiment.baseline.checkpoint
    own = experiment.sparse.from_baseline and given
    network = f"that of {Path(own).name}" if own else experiment.model.backbone
    form = "int8" if "int8" in row else "float32"
    shipped = _of_file(row)
    cut = shipped.get("prune/ratio_achieved", 0)
    stages = ", ".join(f"{name} {key}" for name, key in row["stages"].items())
    return "\n".join(
        [
            f"# {experiment.name}: {row['point']}",
            "",
            "Reads one line of printed text from an image (CRNN: convolutions, BiLSTM, CTC).",
            "",
            f"- Network: {network}, {100 * cut:.1f}% of the channels cut,"
            f" {shipped['cost/params_total'] / 1e6:.3f} M parameters, {form}",
            f"- Word accuracy: {accuracy(row)}, in %, 95% interval, greedy decoding,"
            f" {row['val/samples']:.0f} val lines{_of_seeds(row)}",
            f"- File: {file_bytes(row) / 1e6:.2f} MB, sha256 {digest}",
            f"- Latency: {row[ONNX_LATENCY]:.2f} ms a line of 32 x 128 px, one CPU"
            f" thread, on {row['timed_on']}",
            f"- Data: train {data.train}, val {data.val}",
            f"- Licence of the data: {data.licence or 'not stated'}",
            "- Limits: single lines only; characters outside its charset are never read; lines are"
            f" squeezed to at most {data.max_width} px at 32 px height; a confidence is a product"
            " of probabilities, not a calibrated one",
            f"- Made by: commit {project.git_commit()}; {stages}",
        ]
    )


def _of_seeds(row: Row) -> str:
    """Whose the accuracy is, where it is not the file's alone."""
    if not (seeds := row.get("seeds")):
        return ""
    own = f"seed {next(iter(seeds))}'s, which reads {100 * _of_file(row)[ACCURACY]:.1f}%"
    return f", the mean of seeds {', '.join(seeds)}; this file is {own}"
