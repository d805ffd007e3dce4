"""MLflow's model registry: which model of an experiment bears the alias champion."""

import base64
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crnn.files import sha256
from flows.rows import ACCURACY, ONNX_LATENCY, Row, with_ends

ALIAS = "champion"
PROMOTED = "champion_by_pipeline"
"""Tag of a registered model: the versions, one but for a moment, that were given the alias here."""

MODEL = "model"
"""Folder of a point's MLflow run that holds the served model."""

CARD = "README.md"
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pillow")

FIGURES = (*with_ends(ACCURACY), "cost/onnx_bytes", ONNX_LATENCY)
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
        by_hand: Whether somebody gave it the alias, be it to a model of another origin, which has
            no figures.
    """

    version: str
    digest: str
    key: str
    data: str
    figures: Row
    by_hand: bool


def current(name: str) -> Champion | None:
    """The champion of a registered model; None where there is none."""
    client = MlflowClient()
    try:
        found = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    number, tags = str(found.version), found.tags
    digest, key, data = (tags.get(name, "") for name in ("sha256", "key", "data_key"))
    figures = json.loads(tags.get("figures", "{}"))
    promoted = client.get_registered_model(name).tags.get(PROMOTED, number).split(",")
    by_hand = not figures or number not in promoted
    return Champion(number, digest, key, data, figures, by_hand)


@dataclass(frozen=True)
class Candidate:
    """A point that is to bear the alias.

    Attributes:
        name: Of the registered model.
        row: The point.
        onnx: Its file.
        run_id: Its MLflow run.
        card: What whoever uses it has to know, Markdown.
        example: An image file.
    """

    name: str
    row: Row
    onnx: Path
    run_id: str
    card: str
    example: bytes


def promote(candidate: Candidate) -> str:
    """Register a point's model and give it the alias.

    A registration that was killed is found again by the file's digest.

    Returns:
        Its version.
    """
    client, name, row = MlflowClient(), candidate.name, candidate.row
    digest = sha256(candidate.onnx)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=f"Text recogniser of {name}.")
    same = [v for v in client.search_model_versions(f"name = '{name}'") if _is(v, digest, row)]
    if not same:
        with tempfile.TemporaryDirectory() as folder:
            _write_model(Path(folder) / MODEL, candidate)
            client.log_artifacts(candidate.run_id, str(Path(folder) / MODEL), MODEL)
        tags = {
            "sha256": digest,
            "key": candidate.onnx.parent.name,
            "data_key": row["stages"]["data"],
            "figures": json.dumps({figure: row[figure] for figure in FIGURES}),
        }
        source, run = f"runs:/{candidate.run_id}/{MODEL}", candidate.run_id
        made = client.create_model_version(name, source, run, tags=tags, description=candidate.card)
        same = [made]
    _give_alias(client, name, str(same[0].version))
    return str(same[0].version)


def _give_alias(client: MlflowClient, name: str, version: str) -> None:
    """Remember that it was given here; whoever is killed in between leaves both versions named."""
    before = client.get_registered_model(name).aliases.get(ALIAS, version)
    client.set_registered_model_tag(name, PROMOTED, f"{before},{version}")
    client.set_registered_model_alias(name, ALIAS, version)
    client.set_registered_model_tag(name, PROMOTED, version)


def _is(found: Any, digest: str, row: Row) -> bool:
    return bool(
        found.tags.get("sha256") == digest and found.tags.get("data_key") == row["stages"]["data"]
    )


def _write_model(folder: Path, candidate: Candidate) -> None:
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
            artifacts={serving.NETWORK: str(candidate.onnx)},
            code_paths=[str(package)],
            pip_requirements=[f"{needed}=={version(needed)}" for needed in REQUIREMENTS],
            signature=ModelSignature(Schema([*columns]), Schema([*readings])),
            input_example=pandas.DataFrame(
                {"image": [base64.b64encode(candidate.example).decode()]}
            ),
        )
    (folder / CARD).write_text(candidate.card, encoding="utf-8")
