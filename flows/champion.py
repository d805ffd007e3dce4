"""The best point of a frontier, named in MLflow's registry and ready to be served."""

import base64
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crnn.files import sha256
from flows import definitions, project
from flows.comparison import accuracy
from flows.experiment import ChampionSettings, Experiment
from flows.rows import ACCURACY, Row
from flows.tracking import Tracker

ALIAS = "champion"
MODEL = "model"
"""Folder of a point's MLflow run that holds the served model."""

CARD = "README.md"
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pillow")

RULES: dict[str, Callable[[Row], tuple[float, float]]] = {
    "smallest": lambda row: (row["cost/onnx_bytes"], -row[ACCURACY]),
    "fastest": lambda row: (row["cost/onnx_latency_ms"], -row[ACCURACY]),
    "most_accurate": lambda row: (-row[ACCURACY], row["cost/onnx_bytes"]),
}
"""What each rule makes small."""

ESTIMATE = (ACCURACY, f"{ACCURACY}_low", f"{ACCURACY}_high")
FIGURES = (*ESTIMATE, "cost/onnx_bytes", "cost/onnx_latency_ms")
"""What the registry keeps of a champion, to compare with."""


@dataclass(frozen=True)
class Champion:
    """The model that bears the alias.

    Attributes:
        version: In the registry.
        digest: SHA-256 of its ONNX file.
        key: Of the stage that made the file.
        data: Key of the data stage whose val lines it was measured on.
        figures: Accuracy and costs, named as in a row.
    """

    version: str
    digest: str
    key: str
    data: str
    figures: Row


def crown(
    experiment: Experiment,
    tracker: Tracker,
    rows: Sequence[Row],
    sweep_run: str | None,
    figures_of: Callable[[Champion], Row | None],
) -> str:
    """Give the alias to the best point of a sweep, if it beats the champion that there is.

    Args:
        experiment: Its name is the registered model's; it has the rule.
        tracker: Where MLflow is asked.
        rows: Of the frontier, the baseline first.
        sweep_run: MLflow run of the sweep, or None where MLflow could not be reached.
        figures_of: Figures of the present champion on the val lines of these rows; None where its
            file is not here.

    Returns:
        What became of it, in a sentence.
    """
    settings = experiment.champion
    if not settings or not experiment.export:
        return "no champion: the experiment has no champion or no export section"
    best = best_of(rows, settings)
    if best is None:
        return "no champion: no exported point is small enough and close enough to the baseline"
    reigning = tracker.ask(current, experiment.name) if sweep_run else None
    if reigning and (reason := _stays(reigning, best, rows[0], settings, figures_of(reigning))):
        return f"version {reigning.version} of {experiment.name} stays champion: {reason}"
    version = tracker.ask(_promote, experiment, best, tracker, sweep_run) if sweep_run else None
    if version is None:
        return f"no new champion, as MLflow cannot be reached; {_told(best)} would be compared"
    before = f", in place of version {reigning.version}" if reigning else ""
    return f"version {version} of {experiment.name} is champion: {_told(best)}{before}"


def _stays(
    reigning: Champion, best: Row, baseline: Row, settings: ChampionSettings, figures: Row | None
) -> str | None:
    """Why the champion stays what it is; None where the best point takes its place."""
    if figures is None:
        return "it was measured on other lines, and its file is not here to read these"
    if sha256(project.home() / best["onnx"]) == reigning.digest:
        return f"it is {_told(best)}"
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
    small = row["cost/onnx_bytes"] <= 1e6 * (settings.max_mb or math.inf)
    return bool(accurate and small and row[ACCURACY] > 0)


def beats(row: Row, figures: Row, settings: ChampionSettings) -> bool:
    """Whether a point is better than a champion that was measured on the same lines."""
    rank = RULES[settings.rule]
    return rank(row) < rank(figures)


def _told(row: Row) -> str:
    return f"{row['point']} with {_figures(row)}"


def _figures(row: Row) -> str:
    return (
        f"{accuracy(row)}, {row['cost/onnx_bytes'] / 1e6:.2f} MB,"
        f" {row['cost/onnx_latency_ms']:.2f} ms"
    )


def current(name: str) -> Champion | None:
    """The champion of a registered model; None where there is none."""
    try:
        found = MlflowClient().get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    tags = found.tags
    figures = json.loads(tags["figures"])
    return Champion(found.version, tags["sha256"], tags["key"], tags["data_key"], figures)


def _promote(experiment: Experiment, row: Row, tracker: Tracker, sweep_run: str) -> str:
    """Register a point's model and give it the alias.

    A registration that was killed is found again by the file's digest.

    Returns:
        Its version.
    """
    client, name = MlflowClient(), experiment.name
    onnx = project.home() / row["onnx"]
    digest = sha256(onnx)
    card = model_card(experiment, row, digest)
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, description=f"Text recogniser of {name}.")
    run_id = tracker.point_run(sweep_run, row["point"]) or sweep_run
    same = [v for v in client.search_model_versions(f"name = '{name}'") if _is(v, digest, row)]
    if not same:
        with tempfile.TemporaryDirectory() as folder:
            _write_model(Path(folder) / MODEL, onnx, card, _first_val_line(experiment))
            client.log_artifacts(run_id, str(Path(folder) / MODEL), MODEL)
        tags = {
            "sha256": digest,
            "key": onnx.parent.name,
            "data_key": row["stages"]["data"],
            "figures": json.dumps({figure: row[figure] for figure in FIGURES}),
        }
        source = f"runs:/{run_id}/{MODEL}"
        same = [client.create_model_version(name, source, run_id, tags=tags, description=card)]
    client.set_registered_model_alias(name, ALIAS, same[0].version)
    return str(same[0].version)


def _first_val_line(experiment: Experiment) -> bytes:
    """An image file, the example of an input."""
    buffer = io.BytesIO()
    definitions.open_sources(experiment)[1].image(0).save(buffer, "png")
    return buffer.getvalue()


def _is(found: Any, digest: str, row: Row) -> bool:
    return bool(
        found.tags.get("sha256") == digest and found.tags.get("data_key") == row["stages"]["data"]
    )


def _write_model(folder: Path, onnx: Path, card: str, example: bytes) -> None:
    """The folder that MLflow serves: the network, the code that reads with it, the card."""
    import mlflow
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    from flows import serving

    columns = [
        ColSpec(DataType.string, name, required=False) for name in (serving.IMAGE, serving.PATH)
    ]
    readings = (ColSpec(DataType.string, "text"), ColSpec(DataType.double, "confidence"))
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "crnn"
        source = Path(__file__).parents[1] / "crnn"
        shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            folder,
            python_model=serving.__file__,
            artifacts={serving.NETWORK: str(onnx)},
            code_paths=[str(package)],
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
            signature=ModelSignature(Schema([*columns]), Schema([*readings])),
            input_example=pandas.DataFrame({"image": [base64.b64encode(example).decode()]}),
        )
    (folder / CARD).write_text(card, encoding="utf-8")


def model_card(experiment: Experiment, row: Row, digest: str) -> str:
    """What whoever uses a model has to know, in Markdown."""
    data, model = experiment.data, experiment.model
    form = "int8" if "int8" in row else "float32"
    cut = row.get("prune/ratio_achieved", 0)
    stages = ", ".join(f"{name} {key}" for name, key in row["stages"].items())
    return "\n".join(
        [
            f"# {experiment.name}: {row['point']}",
            "",
            "Reads one line of printed text from an image (CRNN: convolutions, BiLSTM, CTC).",
            "",
            f"- Network: {model.backbone}, {100 * cut:.1f}% of the channels cut,"
            f" {row['cost/params_total'] / 1e6:.3f} M parameters, {form}",
            f"- Word accuracy: {accuracy(row)}, in %, 95% interval, greedy decoding,"
            f" {row['val/samples']:.0f} val lines",
            f"- File: {row['cost/onnx_bytes'] / 1e6:.2f} MB, sha256 {digest}",
            f"- Latency: {row['cost/onnx_latency_ms']:.2f} ms a line of 32 x 128 px, one CPU"
            " thread, on the machine that made it",
            f"- Data: train {data.train}, val {data.val}",
            f"- Licence of the data: {data.licence or 'not stated'}",
            "- Limits: single lines only; characters outside its charset are never read; lines are"
            f" squeezed to at most {data.max_width} px at 32 px height; a confidence is a product"
            " of probabilities, not a calibrated one",
            f"- Made by: commit {project.git_commit()}; {stages}",
        ]
    )
