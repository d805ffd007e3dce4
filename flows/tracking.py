"""MLflow: one canonical run for each stage, one run for each sweep, one for each of its points.

Runs are projections of results on disk, found by tags, so that recording twice changes nothing
and what an outage kept from being recorded is recorded when MLflow is back, or at the next run.
"""

import atexit
import logging
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crnn.errors import CheckpointError, TrackingError
from flows import project
from flows.cache import GAMMAS, MANIFEST, SNAPSHOTS, Manifest, Stage, history
from flows.locks import is_free, single_flight
from flows.rows import figures_in
from flows.views import FRONTIER, TRAINING, page_of_view, view_tags

RETRY_SECONDS = 30
"""MLflow that could not be reached is left alone this long."""

SQLITE = "sqlite:///"

STORE = "mlflow-store"
"""Name of the lock on a fresh store."""

STATE_FOLDER = "state_folder"
"""Tag by which a state folder knows its runs."""

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as a run's description."""

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # It logs what it raises.


def _origin() -> dict[str, str]:
    """Tags of where a run is recorded from: for a person, and for this program."""
    return {"home": f"{platform.node()}:{project.home()}", STATE_FOLDER: project.identity()}


class Tracker:
    """Records of one experiment, written by a thread: no stage waits for MLflow.

    Every method but `sweep` and `ask` returns at once. All of them survive an MLflow that cannot be
    reached.

    Attributes:
        experiment_id: MLflow experiment, or None while MLflow cannot be reached.
    """

    def __init__(self, experiment: str, warn: Callable[[str], None]) -> None:
        self._name = experiment
        self._warn = warn
        self._thread = ThreadPoolExecutor(1, "mlflow")
        self._runs: dict[str, str] = {}
        self._finished: set[str] = set()
        self._unrecorded: dict[str, Manifest] = {}
        self._is_down, self._retry_at = False, -math.inf
        self.experiment_id: str | None = None
        self._later(lambda: None)

    def _connect(self) -> None:
        create_store()
        # Processes that create the same experiment at once collide.
        with single_flight(STORE):
            self._client = MlflowClient()
            found = self._client.get_experiment_by_name(self._name)
            if found is None:
                folder = project.home() / "mlflow" / "artifacts" / self._name
                local = mlflow.get_tracking_uri().startswith("sqlite")
                location = folder.as_uri() if local else None
                experiment_id = self._client.create_experiment(self._name, location)
            else:
                experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    self._client.restore_experiment(experiment_id)
        for run in self._search("tags.kind = 'stage' and attributes.status = 'FINISHED'"):
            self._runs[run.data.tags["stage_key"]] = run.info.run_id
            self._finished.add(run.data.tags["stage_key"])
        self._mark_dead_runs()
        self.experiment_id = str(experiment_id)

    def _mark_dead_runs(self) -> None:
        """Runs whose process was killed stay RUNNING for ever: its lock, free again, tells."""
        for run in self._search(
            f"attributes.status = 'RUNNING' and tags.{STATE_FOLDER} = '{project.identity()}'"
        ):
            key = run.data.tags.get("stage_key", run.data.tags.get("sweep_key"))
            if key and is_free(key) and is_free(_record(key)):
                explanation = (
                    "The process that computed this died. The same command goes on from its last"
                    " finished epoch, in this run."
                )
                self._client.set_tag(run.info.run_id, NOTE, explanation)
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _later(self, action: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Do it in the thread, after all that was asked for before."""
        return self._thread.submit(self._try, action, *arguments)

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do it, or warn once an outage and leave MLflow alone for a while."""
        if time.monotonic() < self._retry_at:
            return None
        try:
            if self.experiment_id is None:
                self._connect()
            result = action(*arguments)
            self._is_down = False
            return result
        except Exception as error:
            # MLflow lets errors of SQLAlchemy, of its plugins and of the network through.
            if not self._is_down:
                self._warn(
                    f"MLflow cannot be reached ({_reason(error)}); what is missing there will be"
                    " recorded when it is back, or by the next run"
                )
            self._is_down, self._retry_at = True, time.monotonic() + RETRY_SECONDS
            return None

    def _search(self, condition: str) -> list[Run]:
        found: list[Run] = []
        token = None
        everywhere = [e.experiment_id for e in self._client.search_experiments()]
        while True:
            page = self._client.search_runs(
                everywhere, condition, max_results=1000, page_token=token
            )
            found += page
            if not (token := page.token):
                return found

    # --- stages -----------------------------------------------------------------------------

    def begin(self, stage: Stage) -> None:
        """Open the canonical run of a stage that is about to be computed, or computed on."""
        self._later(self._begin, stage)

    def _begin(self, stage: Stage) -> None:
        self._finished.discard(stage.key)
        inputs = {name: upstream.key for name, upstream in stage.inputs.items()}
        with single_flight(_record(stage.key)):
            self._open(stage.key, stage.name, stage.label, (stage.settings, inputs))

    def _find(self, condition: str, value: str) -> Run | None:
        return next(iter(self._search(f"{condition} = '{value}'")), None)

    def _open(
        self, key: str, name: str, label: str, made_of: tuple[dict[str, Any], dict[str, str]]
    ) -> str:
        settings, inputs = made_of
        found = self._find("tags.kind = 'stage' and tags.stage_key", key)
        if found is None:
            tags = {"kind": "stage", "stage": name, "stage_key": key}
            upstream = {f"{stage}_key": upstream_key for stage, upstream_key in inputs.items()}
            self._runs[key] = self._create(label, {**tags, **upstream}, settings)
            return self._runs[key]
        run_id = self._runs[key] = str(found.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        if NOTE in found.data.tags:
            self._client.delete_tag(run_id, NOTE)
        if not found.data.params:
            self._client.log_batch(run_id, params=_params(settings))
        return run_id

    def _create(self, name: str, tags: dict[str, str], params: dict[str, Any]) -> str:
        tags = {**tags, "git_commit": project.git_commit(), **_origin()}
        run = self._client.create_run(str(self.experiment_id), run_name=name, tags=tags)
        self._client.log_batch(run.info.run_id, params=_params(params))
        return str(run.info.run_id)

    def epochs(self, stage: Stage, folder: Path) -> None:
        """Log the epochs a stage's folder has and its run has not."""
        self._later(self._epochs, stage, folder)

    def _epochs(self, stage: Stage, folder: Path) -> None:
        if stage.key not in self._runs:
            self._begin(stage)
        # A stage that has ended since has moved its folder, and is recorded from there.
        with single_flight(_record(stage.key)), suppress(FileNotFoundError):
            self._log_epochs(self._runs[stage.key], folder)

    def _log_epochs(self, run_id: str, folder: Path) -> int:
        """Record the epochs that are not yet; the number of all."""
        records = history(folder)
        if not records:
            return 0
        logged = {m.step for m in self._client.get_metric_history(run_id, "train/loss")}
        for record in records:
            step = record.pop("epoch")
            if step in logged:
                continue
            # The image first: metrics mark the epoch as logged.
            gammas = folder / GAMMAS / f"epoch-{step:04d}.npz"
            image = _gamma_image(gammas, f"epoch {step}")
            self._client.log_image(run_id, image, key="gammas", step=step)
            self._client.log_batch(run_id, metrics=_metrics(record, step))
        return len(records)

    def finish(self, manifest: Manifest) -> None:
        """Complete the run of a finished stage, whatever of it is missing."""
        # In the thread, in its turn: were it known there before, the end of another stage would
        # record it, and its own beginning, still to come, open its run again.
        self._thread.submit(self._unrecorded.__setitem__, manifest.key, manifest)
        self._later(self._finish_all)

    def _finish_all(self) -> None:
        """Complete this run, and those that an outage has left behind."""
        for manifest in list(self._unrecorded.values()):
            if manifest.key not in self._finished:
                with single_flight(_record(manifest.key)):
                    self._finish(manifest)
            del self._unrecorded[manifest.key]

    def _finish(self, manifest: Manifest) -> None:
        found = self._find("tags.stage_key", manifest.key)
        if found is None or found.info.status != "FINISHED":
            made_of = (manifest.settings, manifest.inputs)
            run_id = self._open(manifest.key, manifest.stage, manifest.label, made_of)
            self._complete(run_id, manifest)
        else:
            self._runs[manifest.key] = str(found.info.run_id)
        self._finished.add(manifest.key)

    def _complete(self, run_id: str, manifest: Manifest) -> None:
        last = self._log_epochs(run_id, manifest.folder)
        logged = self._client.get_run(run_id).data.metrics
        # A training's figures are those of its last epoch, and what came of it after that.
        more = {n: value for n, value in manifest.metrics.items() if logged.get(n) != value}
        if more:
            self._client.log_batch(run_id, metrics=_metrics(more, last))
        for name in [*manifest.files, MANIFEST]:
            # Snapshots are large, and of use to the cache alone.
            if not name.startswith(SNAPSHOTS):
                folder = str(Path(name).parent) if "/" in name else None
                self._client.log_artifact(run_id, str(manifest.file(name)), folder)
        self._client.set_tag(run_id, "seconds", str(manifest.seconds))
        self._client.set_terminated(run_id, "FINISHED")

    def interrupt(self, stage: Stage, status: str) -> None:
        """Mark the run of a stage that did not finish as KILLED or FAILED."""
        self._later(self._interrupt, stage.key, status)

    def _interrupt(self, key: str, status: str) -> None:
        if key in self._runs:
            self._client.set_terminated(self._runs[key], status)

    def run_of(self, key: str) -> str | None:
        """MLflow run of a stage; None as long as it is not known."""
        return self._runs.get(key)

    # --- sweeps -----------------------------------------------------------------------------

    def sweep(
        self, name: str, key: str, points: list[dict[str, Any]], params: dict[str, Any], files: Path
    ) -> str | None:
        """Record a sweep and its points once; the same points again find the same run.

        Waits for all that is still to be recorded, and tries once more what was not.

        Args:
            name: Of the run.
            key: Identifies the set of points.
            points: Rows of the frontier.
            params: Resolved settings of the experiment.
            files: Folder of tables and plots.
        """
        self._thread.submit(self._retry_now)
        run_id: str | None = self.ask(self._sweep, name, key, points, params, files)
        return run_id

    def ask(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Have it done after all that is still to be recorded, and wait for what it returns.

        None where MLflow cannot be reached.
        """
        return self._later(action, *arguments).result()

    def point_run(self, sweep_run: str, point: str) -> str | None:
        """MLflow run of a point of a sweep; call it through ask."""
        condition = f"tags.mlflow.parentRunId = '{sweep_run}' and attributes.run_name"
        found = self._find(condition, point)
        return str(found.info.run_id) if found else None

    def _retry_now(self) -> None:
        self._retry_at = -math.inf

    def _sweep(
        self, name: str, key: str, points: list[dict[str, Any]], params: dict[str, Any], files: Path
    ) -> str:
        self._finish_all()
        self._save_views()
        with single_flight(_record(key)):
            found = self._find("tags.kind = 'sweep' and tags.sweep_key", key)
            if found is None:
                sweep_id = self._create(name, {"kind": "sweep", "sweep_key": key}, params)
            else:
                sweep_id = str(found.info.run_id)
                if found.info.status == "FINISHED":
                    return sweep_id
            children = self._search(f"tags.mlflow.parentRunId = '{sweep_id}'")
            there = {child.info.run_name: child for child in children}
            runs = {
                point["point"]: self._point(sweep_id, key, point, there.get(point["point"]))
                for point in points
            }
            description = f"{self._charts()}\n\n{self._links('Points of this sweep', runs)}"
            self._client.set_tag(sweep_id, NOTE, description)
            self._client.log_dict(sweep_id, params, "experiment.json")
            self._client.log_artifacts(sweep_id, str(files))
            self._client.set_terminated(sweep_id, "FINISHED")
        return sweep_id

    def _save_views(self) -> None:
        """Give the experiment the views that it has not yet; people change those it has."""
        experiment = self._client.get_experiment(str(self.experiment_id))
        for tag, view in view_tags().items():
            if tag not in experiment.tags:
                self._client.set_experiment_tag(experiment.experiment_id, tag, view)

    def _charts(self) -> str:
        """A description that leads to the charts of the experiment, Markdown."""
        views = {"the frontier": FRONTIER, "training curves and gammas": TRAINING}
        pages = {what: page_of_view(str(self.experiment_id), view) for what, view in views.items()}
        return "Charts: " + ", ".join(f"[{what}]({page})" for what, page in pages.items())

    def _links(self, title: str, runs: dict[str, str]) -> str:
        """A description that leads to other runs, Markdown."""
        page = f"#/experiments/{self.experiment_id}/runs"
        links = [f"- [{name}]({page}/{run})" for name, run in runs.items() if run]
        return "\n".join([f"{title}:", *links])

    def _point(self, sweep_id: str, key: str, point: dict[str, Any], found: Run | None) -> str:
        """Record a point of a sweep, or complete the run that a killed process left of it.

        Returns:
            Its run.
        """
        if found is not None and found.info.status == "FINISHED":
            return str(found.info.run_id)
        tags = {
            "kind": "point",
            "sweep_key": key,
            "mlflow.parentRunId": sweep_id,
            **_origin(),
        }
        behind = {stage: self.run_of(made) or "" for stage, made in point["stages"].items()}
        tags |= {f"{stage}_key": made for stage, made in point["stages"].items()}
        tags |= {f"{stage}_run": run for stage, run in behind.items()}
        tags[NOTE] = self._links("Made by", {"sweep": sweep_id, **behind})
        run = found or self._client.create_run(
            str(self.experiment_id), run_name=point["point"], tags=tags
        )
        self._client.log_batch(
            run.info.run_id,
            metrics=[] if run.data.metrics else _metrics(figures_in(point), 0),
            tags=[RunTag("pareto", str(point["pareto"]).lower())],
        )
        self._client.set_terminated(run.info.run_id, "FINISHED")
        return str(run.info.run_id)


def _record(key: str) -> str:
    """Name of the lock of a run's records: two pipelines would log the same step twice."""
    return f"record-{key}"


def create_store() -> None:
    """Make the project's own store whole or not at all; one that is there is left alone.

    MLflow makes its tables in many steps, and cannot go on with those that a killed process left.
    A store that the user has named is left to MLflow.
    """
    path = project.mlflow_store()
    unfinished = path.with_name(f"{path.name}.unfinished")
    with single_flight(STORE):
        if mlflow.get_tracking_uri() != f"{SQLITE}{path}" or path.exists():
            return
        for left in path.parent.glob(f"{unfinished.name}*"):
            left.unlink()
        MlflowClient(f"{SQLITE}{unfinished}")
        unfinished.rename(path)


def deleted_and_registered() -> tuple[set[str], set[str]]:
    """What MLflow knows of the worth of things on disk.

    Returns:
        Keys of the sweeps whose run was deleted, and keys of the stages behind registered models.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    create_store()
    try:
        client = MlflowClient()
        everywhere = [e.experiment_id for e in client.search_experiments(ViewType.ALL)]
        sweeps = client.search_runs(
            everywhere, "tags.kind = 'sweep'", ViewType.ALL, max_results=50_000
        )
        versions = client.search_model_versions(max_results=10_000)
        registered = {key for version in versions for key in _stages_behind(client, version)}
    except Exception as error:
        raise TrackingError(
            f"MLflow cannot be reached ({_reason(error)}); gc asks it first"
        ) from error
    # A sweep that was deleted and recorded again has a run of each kind.
    active = {
        r.data.tags["sweep_key"] for r in sweeps if r.info.lifecycle_stage == LifecycleStage.ACTIVE
    }
    return {run.data.tags["sweep_key"] for run in sweeps} - active, registered


def _stages_behind(client: MlflowClient, version: ModelVersion) -> set[str]:
    """Keys of the stages that a registered model was made by, as far as MLflow still knows them.

    The pipeline tags the versions that it registers; one that was registered by hand has its run
    alone, which may have been purged.
    """
    keys = {version.tags["key"]} if "key" in version.tags else set()
    if not version.run_id:
        return keys
    try:
        tags = client.get_run(version.run_id).data.tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return keys
    return keys.union(key for tag, key in tags.items() if tag.endswith("_key"))


def download(uri: str) -> Path:
    """Fetch an artifact named by an MLflow URI (runs:/..., models:/..., mlflow-artifacts:/...).

    The copy goes when this process ends.

    Raises:
        CheckpointError: MLflow has no such artifact, or cannot be reached.
    """
    create_store()
    folder = TemporaryDirectory(prefix="crnn-slim-")
    atexit.register(folder.cleanup)
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder.name))
    except Exception as error:  # A damaged store is an error of SQLAlchemy's.
        raise CheckpointError(f"MLflow gives no artifact at {uri}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of an error that says what happened; SQLAlchemy may put how it came to it before."""
    lines = (line for line in str(error).splitlines() if not line.startswith("(raised as a result"))
    return next(filter(str.strip, lines), type(error).__name__)[:200]


def _metrics(values: dict[str, float], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in values.items()]


def _params(tree: dict[str, Any]) -> list[Param]:
    """Settings as MLflow params, `section.key`; MLflow takes 6,000 characters of each."""
    return [Param(key, str(value)[:6000]) for key, value in _flat(tree).items()]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _gamma_image(path: Path, title: str) -> np.ndarray:
    """|gamma| of every layer as a picture, (H, W, 3) uint8; its axes are the same in all runs."""
    from flows.report import gamma_ridges

    with np.load(path) as arrays:
        return gamma_ridges({name: arrays[name] for name in arrays.files}, title)
