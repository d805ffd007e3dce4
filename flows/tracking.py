"""MLflow: one canonical run for each stage, one run for each sweep, one for each of its points.

Runs are projections of results on disk, found by tags, so that recording twice changes nothing
and what an outage kept from being recorded is recorded the next time the stage is met.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crnn.errors import CheckpointError
from flows import project
from flows.cache import GAMMAS, HISTORY, MANIFEST, SNAPSHOTS, Manifest, Stage
from flows.locks import single_flight

RETRY_SECONDS = 30
"""MLflow that could not be reached is left alone this long."""

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


class Tracker:
    """Records of one experiment. Every method survives an MLflow that cannot be reached.

    Attributes:
        experiment_id: MLflow experiment, or None while MLflow cannot be reached.
    """

    def __init__(self, experiment: str, warn: Callable[[str], None]) -> None:
        self._name = experiment
        self._warn = warn
        self._lock = threading.RLock()
        self._recorded: dict[str, str] = {}
        self._failed_at = -math.inf
        self.experiment_id: str | None = None
        self._try(lambda: None)

    def _connect(self) -> None:
        # Processes that create the same fresh SQLite store at once collide.
        with single_flight("mlflow-store", lambda: False, lambda _: None):
            self._client = MlflowClient()
            found = self._client.get_experiment_by_name(self._name)
            if found is None:
                folder = project.home() / "mlflow" / "artifacts" / self._name
                local = mlflow.get_tracking_uri().startswith("sqlite")
                location = folder.as_uri() if local else None
                experiment_id = self._client.create_experiment(self._name, location)
            else:
                experiment_id = found.experiment_id
        self._everywhere = [e.experiment_id for e in self._client.search_experiments()]
        for run in self._search("tags.kind = 'stage' and attributes.status = 'FINISHED'"):
            self._recorded[run.data.tags["stage_key"]] = run.info.run_id
        self.experiment_id = str(experiment_id)

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do it, or warn once an outage and leave MLflow alone for a while."""
        with self._lock:
            if time.monotonic() - self._failed_at < RETRY_SECONDS:
                return None
            try:
                if self.experiment_id is None:
                    self._connect()
                return action(*arguments)
            except Exception as error:
                # MLflow lets errors of SQLAlchemy, of its plugins and of the network through.
                if self._failed_at == -math.inf:
                    reason = str(error).strip().splitlines()[0][:200]
                    self._warn(
                        f"MLflow cannot be reached ({reason}); what is missing there will be"
                        " recorded when the stage is met again"
                    )
                self._failed_at = time.monotonic()
                return None

    def _search(self, condition: str) -> list[Run]:
        found: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                self._everywhere, condition, max_results=1000, page_token=token
            )
            found += page
            if not (token := page.token):
                return found

    # --- stages -----------------------------------------------------------------------------

    def begin(self, stage: Stage) -> str | None:
        """Open the canonical run of a stage that is about to be computed, or computed on."""
        self._recorded.pop(stage.key, None)
        run_id: str | None = self._try(
            self._open, stage.key, stage.name, stage.label, stage.settings
        )
        return run_id

    def _find(self, condition: str, value: str) -> Run | None:
        return next(iter(self._search(f"{condition} = '{value}'")), None)

    def _open(self, key: str, name: str, label: str, settings: dict[str, Any]) -> str:
        found = self._find("tags.kind = 'stage' and tags.stage_key", key)
        if found is None:
            return self._create(label, {"kind": "stage", "stage": name, "stage_key": key}, settings)
        run_id = str(found.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        if not found.data.params:
            self._client.log_batch(run_id, params=_params(settings))
        return run_id

    def _create(self, name: str, tags: dict[str, str], params: dict[str, Any]) -> str:
        tags = {**tags, "git_commit": project.git_commit()}
        run = self._client.create_run(str(self.experiment_id), run_name=name, tags=tags)
        self._client.log_batch(run.info.run_id, params=_params(params))
        return str(run.info.run_id)

    def epochs(self, run_id: str | None, folder: Path) -> None:
        """Log the epochs a stage's folder has and its run has not."""
        if run_id:
            self._try(self._epochs, run_id, folder)

    def _epochs(self, run_id: str, folder: Path) -> None:
        if not (folder / HISTORY).exists():
            return
        logged = {m.step for m in self._client.get_metric_history(run_id, "train/loss")}
        for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            step = record.pop("epoch")
            if step in logged:
                continue
            # The image first: metrics mark the epoch as logged.
            gammas = folder / GAMMAS / f"epoch-{step:04d}.npz"
            image = _gamma_image(gammas, f"epoch {step}")
            self._client.log_image(run_id, image, key="gammas", step=step)
            self._client.log_batch(run_id, metrics=_metrics(record, step))

    def finish(self, manifest: Manifest) -> None:
        """Complete the run of a finished stage, whatever of it is missing.

        The caller holds the stage's lock, so that two processes never complete it at once.
        """
        if manifest.key not in self._recorded:
            self._try(self._finish, manifest)

    def _finish(self, manifest: Manifest) -> None:
        found = self._find("tags.stage_key", manifest.key)
        if found is None or found.info.status != "FINISHED":
            run_id = self._open(manifest.key, manifest.stage, manifest.label, manifest.settings)
            self._complete(run_id, manifest)
        else:
            run_id = str(found.info.run_id)
        self._recorded[manifest.key] = run_id

    def _complete(self, run_id: str, manifest: Manifest) -> None:
        self._epochs(run_id, manifest.folder)
        if not self._client.get_run(run_id).data.metrics:  # Of a stage without epochs.
            self._client.log_batch(run_id, metrics=_metrics(manifest.metrics, 0))
        for name in [*manifest.files, MANIFEST]:
            # Snapshots are large, and of use to the cache alone.
            if not name.startswith(SNAPSHOTS):
                folder = str(Path(name).parent) if "/" in name else None
                self._client.log_artifact(run_id, str(manifest.file(name)), folder)
        self._client.set_tag(run_id, "seconds", str(manifest.seconds))
        self._client.set_terminated(run_id, "FINISHED")

    def interrupt(self, run_id: str | None, status: str) -> None:
        """Mark the run of a stage that did not finish as KILLED or FAILED."""
        if run_id:
            self._try(self._client.set_terminated, run_id, status)

    def run_of(self, key: str) -> str | None:
        """MLflow run of a recorded stage."""
        return self._recorded.get(key)

    # --- sweeps -----------------------------------------------------------------------------

    def sweep(
        self, name: str, key: str, points: list[dict[str, Any]], params: dict[str, Any], files: Path
    ) -> str | None:
        """Record a sweep and its points once; the same points again find the same run.

        Args:
            name: Of the run.
            key: Identifies the set of points.
            points: Rows of the frontier.
            params: Resolved settings of the experiment.
            files: Folder of tables and plots.
        """
        run_id: str | None = self._try(self._sweep, name, key, points, params, files)
        return run_id

    def _sweep(
        self, name: str, key: str, points: list[dict[str, Any]], params: dict[str, Any], files: Path
    ) -> str:
        with single_flight(key, lambda: False, lambda _: None):
            found = self._find("tags.kind = 'sweep' and tags.sweep_key", key)
            if found is None:
                sweep_id = self._create(name, {"kind": "sweep", "sweep_key": key}, params)
            else:
                sweep_id = str(found.info.run_id)
                if found.info.status == "FINISHED":
                    return sweep_id
            children = self._search(f"tags.mlflow.parentRunId = '{sweep_id}'")
            there = {r.info.run_name for r in children if r.info.status == "FINISHED"}
            for point in points:
                if point["point"] not in there:
                    self._point(sweep_id, key, point)
            self._client.log_dict(sweep_id, params, "experiment.json")
            self._client.log_artifacts(sweep_id, str(files))
            self._client.set_terminated(sweep_id, "FINISHED")
        return sweep_id

    def _point(self, sweep_id: str, key: str, point: dict[str, Any]) -> None:
        tags = {"kind": "point", "sweep_key": key, "mlflow.parentRunId": sweep_id}
        for stage, stage_key in point["stages"].items():
            tags[f"{stage}_key"] = stage_key
            tags[f"{stage}_run"] = self.run_of(stage_key) or ""
        run = self._client.create_run(str(self.experiment_id), run_name=point["point"], tags=tags)
        figures = {
            name: value
            for name, value in point.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._client.log_batch(
            run.info.run_id,
            metrics=_metrics(figures, 0),
            tags=[RunTag("pareto", str(point["pareto"]).lower())],
        )
        self._client.set_terminated(run.info.run_id, "FINISHED")


def download(uri: str) -> Path:
    """Fetch an artifact named by an MLflow URI (runs:/..., models:/..., mlflow-artifacts:/...).

    Raises:
        CheckpointError: MLflow has no such artifact, or cannot be reached.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"MLflow gives no artifact at {uri}: {reason}") from error


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
    """Histogram of |gamma| of every layer, (H, W, 3) uint8; the axes are the same in all runs."""
    from flows.report import gamma_histograms

    with np.load(path) as arrays:
        return gamma_histograms({name: arrays[name] for name in arrays.files}, title)
