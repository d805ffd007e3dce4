"""The Prefect flow: stages chained, cached, computed once, and swept over prune ratios."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from crnn.errors import StoppedError
from flows import cache, children, definitions, display, project, report
from flows.cache import READINESS, Manifest, Stage
from flows.experiment import Experiment
from flows.flow_runs import attended
from flows.locks import seats, single_flight
from flows.tracking import Tracker

UI = "http://127.0.0.1:5000"
"""Where `crnn-slim ui` serves MLflow."""

INTERRUPTED, TERMINATED = "Interrupted", "Terminated"
"""Names of the Cancelled state after Ctrl-C and after SIGTERM."""

MAX_THREADS = 64
"""Tasks that wait at once; how many of them train at once is parallel_finetunes."""


@dataclass(frozen=True)
class Context:
    """What every stage of one flow run shares.

    Attributes:
        experiment: Its definition.
        tracker: MLflow.
        computed: Labels of the stages that were computed, the others came from the cache.
    """

    experiment: Experiment
    tracker: Tracker
    computed: list[str]


@dataclass(frozen=True)
class Frontier:
    """A finished sweep.

    Attributes:
        rows: The baseline and one row for each ratio.
        computed: Labels of the stages that had to be computed.
        sweep_run: MLflow run of the sweep, or None where MLflow could not be reached.
        report: Folder of its tables and plots.
    """

    rows: list[report.Row]
    computed: list[str]
    sweep_run: str | None
    report: Path


def parallel_finetunes(experiment: Experiment) -> int:
    """How many cut networks are trained side by side.

    A small network cannot keep several cores busy, so each gets a quarter of the machine. With
    a GPU one at a time: that is faster than sharing it. Never more than there are cores.
    """
    if experiment.execution.parallel != "auto":
        return min(experiment.execution.parallel, cores())
    return 1 if shutil.which("nvidia-smi") else min(4, cores())


def cores() -> int:
    """Cores this process may use: fewer than the machine has under an affinity or a container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(count or 1, int(quota) // int(period)))
    return count or 1


@task(cache_policy=NO_CACHE, task_run_name="data")
def data(context: Context) -> Any:
    """Check and index the samples."""
    return run_stage(context, definitions.data_stage(context.experiment))


@task(cache_policy=NO_CACHE, task_run_name="baseline")
def baseline(context: Context, samples: Manifest) -> Any:
    """Train the uncut network."""
    return run_stage(context, definitions.baseline_stage(context.experiment, samples))


@task(cache_policy=NO_CACHE, task_run_name="sparse")
def sparse(context: Context, samples: Manifest, uncut: Manifest) -> Any:
    """Train with the sparsity penalty."""
    return run_stage(context, definitions.sparse_stage(context.experiment, samples, uncut))


@task(cache_policy=NO_CACHE, task_run_name="target {kind} {value}")
def target(context: Context, thin: Manifest, kind: str, value: float) -> Any:
    """Find the ratio that meets a target."""
    return run_stage(context, definitions.target_stage(context.experiment, thin, kind, value))


@task(cache_policy=NO_CACHE, task_run_name="prune {ratio}")
def prune(context: Context, samples: Manifest, thin: Manifest, ratio: float) -> Any:
    """Cut the channels of one ratio."""
    stage = definitions.prune_stage(context.experiment, samples, thin, ratio)
    return run_stage(context, stage, whole_machine=False)


@task(cache_policy=NO_CACHE, task_run_name="finetune {ratio}")
def finetune(context: Context, samples: Manifest, pruned: Manifest, ratio: float) -> Any:
    """Train the cut network on."""
    stage = definitions.finetune_stage(context.experiment, samples, pruned, ratio)
    return run_stage(context, stage, whole_machine=False)


@task(cache_policy=NO_CACHE, task_run_name="measure {model.label}")
def measure(context: Context, model: Manifest) -> Any:
    """Parameters, multiply-adds, bytes, latency."""
    return run_stage(context, definitions.measure_stage(model))


@flow(
    flow_run_name="{experiment.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_THREADS),  # type: ignore[arg-type]
    validate_parameters=False,
)
def frontier(experiment: Experiment) -> Frontier | State[Any]:
    """Sweep the prune ratios of an experiment. What is cached is not computed again.

    Args:
        experiment: Its whole definition.

    Returns:
        The frontier; or a Cancelled state, which keeps every finished epoch.

    Raises:
        UserError: A mistake in the data or the settings.
    """
    children.restart()
    context = Context(experiment, Tracker(experiment.name, display.say), [])
    try:
        with attended():
            return _sweep(context)
    except KeyboardInterrupt:
        return Cancelled(name=INTERRUPTED, message=children.KEPT)
    except TerminationSignal:
        return Cancelled(name=TERMINATED, message=children.KEPT)
    except CancelledRun:
        return Cancelled(message=children.KEPT)
    finally:
        # Before the task runner waits for its threads, which wait for their processes.
        children.stop()


def _sweep(context: Context) -> Frontier:
    samples = _result(data.submit(context))
    uncut = _result(baseline.submit(context, samples))
    thin = _result(sparse.submit(context, samples, uncut))
    points = _points(context, thin)
    _say_what_is_free(thin, points)
    started = []
    for _, ratio, _ in points:
        cutting: Any = prune.submit(context, samples, thin, ratio)
        started.append((cutting, finetune.submit(context, samples, cutting, ratio)))
    tuned = [(_result(cutting), _result(tuning)) for cutting, tuning in started]
    # Latency needs a quiet machine: one network after another, when nothing trains any more.
    cost = _result(measure.submit(context, uncut))
    rows = [_row("baseline", uncut, cost, {"data": samples, "baseline": uncut})]
    for (name, _, wish), (pruned, model) in zip(points, tuned, strict=True):
        stages = {"data": samples, "sparse": thin, **wish, "prune": pruned, "finetune": model}
        cost = _result(measure.submit(context, model))
        rows.append(_row(name, model, cost, stages))
    for row, best in zip(rows, report.pareto(rows), strict=True):
        row["pareto"] = best
    return _publish(context, rows)


def _points(context: Context, thin: Manifest) -> list[tuple[str, float, dict[str, Manifest]]]:
    """Name and ratio of every point, and the stage that found the ratio where one did."""
    experiment = context.experiment
    points: list[tuple[str, float, dict[str, Manifest]]] = [
        (f"{ratio:g}", ratio, {}) for ratio in experiment.ratios
    ]
    for kind, value in experiment.prune.targets.wishes().items():
        found = _result(target.submit(context, thin, kind, value))
        name = definitions.point_of_target(kind, value)
        points.append((name, found.metrics["target/ratio"], {"target": found}))
    return points


def _say_what_is_free(thin: Manifest, points: list[tuple[str, float, dict[str, Manifest]]]) -> None:
    """The verdict of the sparse stage, and a warning for each point beyond it."""
    verdict = json.loads(thin.file(READINESS).read_text(encoding="utf-8"))
    display.say(f"{thin.label}: {verdict['sentence']}")
    for name, ratio, _ in points:
        if ratio > verdict["free_ratio"]:
            display.say(
                f"{name} is beyond {verdict['free_ratio']:g}: live channels go, and what they did"
                " is lost as far as fine-tuning does not regain it"
            )


def _result(future: PrefectFuture[Any]) -> Manifest:
    manifest: Manifest = future.result()
    return manifest


def _row(point: str, model: Manifest, cost: Manifest, stages: dict[str, Manifest]) -> report.Row:
    """One point of the frontier: what was cut, what it reads, what it costs."""
    pruned = stages.get("prune")
    cut = {
        "prune/ratio_requested": 0.0,
        "prune/ratio_achieved": 0.0,
        **({} if pruned is None else _cut_figures(pruned)),
    }
    wish = stages["target"].metrics if "target" in stages else {}
    scores = {name: value for name, value in model.metrics.items() if name.startswith("val/")}
    keys = {name: manifest.key for name, manifest in {**stages, "measure": cost}.items()}
    checkpoint = str(model.file(model.result).relative_to(project.home()))
    return {
        "point": point,
        **cut,
        **wish,
        **scores,
        **cost.metrics,
        "checkpoint": checkpoint,
        "stages": keys,
    }


def _cut_figures(pruned: Manifest) -> dict[str, float]:
    figures = {n: v for n, v in pruned.metrics.items() if n.startswith("prune/")}
    return {**figures, "prune/word_accuracy_untuned": pruned.metrics[report.ACCURACY]}


def _publish(context: Context, rows: list[report.Row]) -> Frontier:
    """Write the report, record the sweep in MLflow, and show the table in Prefect."""
    experiment = context.experiment
    # A point that was measured anew makes another sweep: what is recorded is never changed.
    content = json.dumps([experiment.name, rows])
    key = f"sweep-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = project.reports_folder() / experiment.name / key
    report.write_report(folder, experiment.name, rows)
    name = f"{experiment.name} {rows[1]['point']} to {rows[-1]['point']}"
    params = experiment.model_dump(mode="json", exclude={"execution"})
    sweep_run = context.tracker.sweep(name, key, rows, params, folder)
    header, cells = report.table_cells(rows)
    create_table_artifact(
        [dict(zip(header, line, strict=True)) for line in cells],
        key=f"frontier-{experiment.name.lower().replace('_', '-')}",
        description=_links(context.tracker, rows, sweep_run),
    )
    return Frontier(rows, context.computed, sweep_run, folder)


def _links(tracker: Tracker, rows: list[report.Row], sweep_run: str | None) -> str:
    """Markdown list of the MLflow runs behind a frontier."""
    server = os.environ["MLFLOW_TRACKING_URI"]
    address = server if server.startswith("http") else UI
    runs = {"sweep": sweep_run}
    for row in rows:
        runs |= {f"{stage} {row['point']}": tracker.run_of(k) for stage, k in row["stages"].items()}
    experiment = f"{address}/#/experiments/{tracker.experiment_id}"
    links = [f"- [{name}]({experiment}/runs/{run})" for name, run in runs.items() if run]
    return "\n".join(["MLflow runs (`crnn-slim ui` serves them):", *links])


def run_stage(context: Context, stage: Stage, whole_machine: bool = True) -> Any:
    """Find a stage's result, or compute it in a process of its own.

    Args:
        context: Of the flow run.
        stage: What to compute.
        whole_machine: It has all cores to itself; otherwise others of its kind run beside it.

    Returns:
        A completed state that holds the manifest; its name is "Cached" where nothing was computed.
    """
    logger = get_run_logger()

    def log(message: str) -> None:
        logger.warning(message)
        display.say(message)

    try:
        return _find_or_compute(context, stage, whole_machine, log)
    except StoppedError as stopped:
        return Cancelled(message=str(stopped))


def _find_or_compute(
    context: Context, stage: Stage, whole_machine: bool, log: Callable[[str], None]
) -> Any:
    with single_flight(stage.key, children.stopping, log) as lock:
        manifest = cache.find(stage.key, log)
        cached = manifest is not None
        if manifest is None:
            total = cores()
            parallel = 1 if whole_machine else parallel_finetunes(context.experiment)
            count = math.ceil(total / parallel)
            with seats(count, total, children.stopping, log):
                manifest = _compute(context, stage, count, lock)
        context.tracker.finish(manifest)
        shutil.rmtree(project.work_folder() / stage.key, ignore_errors=True)
    if cached:
        display.say(f"{stage.label}: cached")
        return Completed(name="Cached", message=f"verified {stage.key}", data=manifest)
    context.computed.append(stage.label)
    display.say(f"{stage.label}: done in {manifest.seconds:.0f} s")
    return Completed(message=stage.key, data=manifest)


def _compute(context: Context, stage: Stage, cpus: int, lock: int) -> Manifest:
    folder = project.work_folder() / stage.key
    folder.mkdir(parents=True, exist_ok=True)
    context.tracker.begin(stage)

    def on_event(event: children.Event) -> None:
        display.show(stage.label, event)
        if event["event"] == "epoch":
            context.tracker.epochs(stage, folder / "out")

    try:
        job = _job(context.experiment, stage, cpus, folder)
        outcome = children.run_child(job, folder, lock, on_event)
    except BaseException as error:
        stopped = isinstance(error, StoppedError)
        context.tracker.interrupt(stage, "KILLED" if stopped else "FAILED")
        raise
    finally:
        display.end(stage.label)
    return cache.publish(stage, folder / "out", outcome, context.tracker.run_of(stage.key))


def _job(experiment: Experiment, stage: Stage, cpus: int, folder: Path) -> dict[str, Any]:
    """All a stage's process is told: settings, upstream files, and how to use the machine."""
    return {
        "stage": stage.name,
        "settings": stage.settings,
        "data": experiment.data.model_dump(mode="json"),
        "seed": experiment.seed,
        "ratios": experiment.ratios,
        "prune": experiment.prune.model_dump(mode="json"),
        "checkpoint": experiment.baseline.checkpoint,
        "inputs": {
            name: {"file": str(m.file(m.result).resolve()), "sha256": m.digest}
            for name, m in stage.inputs.items()
        },
        "folder": str(folder),
        "cpus": cpus,
        "loader_workers": experiment.execution.loader_workers,
        "parent": os.getpid(),
    }
