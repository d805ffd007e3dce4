"""A stage of a flow run: found in the cache, or computed in a process on its share of the cores."""

import functools
import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from crnn.errors import PassingError, StoppedError
from flows import cache, children, definitions, display, project, store
from flows.cache import Manifest, Stage
from flows.experiment import Experiment
from flows.forecast import Forecast, forecast_of
from flows.leases import lease
from flows.locks import seats, single_flight
from flows.rows import ACCURACY
from flows.tracking import Tracker

UNMENTIONED_LOSS = 0.2
"""Points of word accuracy that a cut may cost without a word."""

SHORT_OF_RATIO = 0.02
"""How far below its ratio a cut may stay unmentioned."""


@dataclass(frozen=True)
class Context:
    """What every stage of one flow run shares.

    Attributes:
        experiment: Its definition.
        tracker: MLflow.
        computed: Labels of the stages that were computed, the others came from the cache.
        forecast: How far the sweep is.
        stop: Set when every stage of the run is to end.
        seed: Of the trainings; each seed's stages have a context of their own.
        elsewhere: Whether this is a worker of a cluster, and the flow runs in another process.
        collected: Task runs of a cluster whose stages have been noted here: several points start
            from one cut.
    """

    experiment: Experiment
    tracker: Tracker
    computed: list[str]
    forecast: Forecast
    stop: threading.Event
    seed: int
    elsewhere: bool = False
    collected: set[UUID] = field(default_factory=set)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a worker of a cluster is sent."""
        return _elsewhere, (self.experiment, self.seed, os.environ["MLFLOW_TRACKING_URI"])

    @property
    def of_seed(self) -> str:
        """What is behind the names of this seed's stages."""
        return definitions.of_seed(self.experiment, self.seed)

    def note(self, manifest: Manifest, cached: bool) -> None:
        """Say that a stage of the run has finished, and count it."""
        self.forecast.finish(manifest)
        self.show_sweep()
        if cached:
            display.say(f"{manifest.label}: cached")
        else:
            self.computed.append(manifest.label)
            left = "" if self.elsewhere else f" ({self.forecast.sentence()})"
            display.say(f"{manifest.label}: done in {manifest.seconds:.0f} s{left}")
        _say_what_is_lost(manifest)

    def show_sweep(self) -> None:
        """Show how far the sweep is, where it is to be seen: a worker has a part of it."""
        if not self.elsewhere:
            display.show_sweep(*self.forecast.stages, self.forecast.sentence())


def _say_what_is_lost(manifest: Manifest) -> None:
    """Say where samples are not taken as they are, or a cut does more, or less, than expected."""
    figures = manifest.metrics
    if bad := figures.get("data/bad_samples"):
        display.say(
            f"{manifest.label}: samples left out: {bad:.0f}, listed in"
            f" {manifest.file('bad_samples.csv')}"
        )
    if squeezed := figures.get("data/squeezed_lines"):
        display.say(
            f"{manifest.label}: lines squeezed to data.max_width: {squeezed:.0f}, the widest from"
            f" {figures['data/widest_px']:.0f} px"
        )
    if live := figures.get("prune/live_channels_removed"):
        display.say(
            f"{manifest.label}: live channels go: {live:.0f}, and what they did is lost as far as"
            " fine-tuning does not regain it"
        )
    lost = 100 * (figures.get("prune/word_accuracy_before", 0) - figures.get(ACCURACY, 0))
    if manifest.stage == "prune" and lost > UNMENTIONED_LOSS:
        display.say(f"{manifest.label}: the cut itself lost {lost:.1f} points of word accuracy")
    achieved = figures.get("prune/ratio_achieved", 1)
    if figures.get("prune/ratio_requested", 0) - achieved > SHORT_OF_RATIO:
        settings = manifest.settings["prune"]
        if settings["selection"] == "reference":
            reason = "prune.selection: reference takes nowhere else what a floor saves"
        elif settings["round_to"] == 1:
            reason = (
                "of a dead branch what prune.min_channels or min_ratio would keep goes at once, and"
                " would be too many"
            )
        else:
            reason = (
                "prune.round_to takes no live ones along while enough are dead; a higher"
                " sparse.target_ratio leaves more"
            )
        display.say(f"{manifest.label}: only {100 * achieved:.1f}% of the channels go: {reason}")


def _elsewhere(experiment: Experiment, seed: int, mlflow: str) -> Context:
    """The context of a flow run on a worker of a cluster."""
    os.environ["MLFLOW_TRACKING_URI"] = mlflow
    project.configure_environment()
    store.use(experiment.execution.store)
    forecast = forecast_of(experiment, parallel_finetunes(experiment))
    tracker = _tracker(experiment.name, mlflow)
    return Context(experiment, tracker, [], forecast, threading.Event(), seed, elsewhere=True)


@functools.cache
def _tracker(experiment: str, _mlflow: str) -> Tracker:
    """One for all tasks of a worker: each has a thread of its own."""
    return Tracker(experiment, display.say)


def parallel_finetunes(experiment: Experiment) -> int:
    """How many cut networks are trained side by side.

    A small network cannot keep several cores busy, so each gets a quarter of the machine. With
    a GPU one at a time: that is faster than sharing it; and so with several machines, which meet
    at one rendezvous. Never more than there are cores.
    """
    if experiment.execution.nodes > 1:
        return 1
    count = len(project.cores())
    if experiment.execution.parallel != "auto":
        return min(experiment.execution.parallel, count)
    if shutil.which("nvidia-smi"):
        return 1
    return count // math.ceil(count / 4)


def find_or_compute(
    context: Context, stage: Stage, log: Callable[[str], None]
) -> tuple[Manifest, bool]:
    """Find a stage's result, or compute it in a process of its own.

    Args:
        context: Of the flow run.
        stage: What to compute.
        log: Told whom it waits for, and of damaged results.

    Returns:
        The manifest, labelled as this experiment calls the stage, and whether it was cached.

    Raises:
        StoppedError: The pipeline was told to stop.
    """
    with (
        single_flight(stage.key, context.stop.is_set, log) as lock,
        lease(stage.key, context.stop.is_set, log),
    ):
        manifest = cache.find(stage.key, log)
        cached = manifest is not None
        if manifest is None:
            sharing = stage.name in definitions.SHARING
            parallel = parallel_finetunes(context.experiment) if sharing else 1
            count, shared = shares(parallel)
            if context.elsewhere:
                for upstream in stage.inputs.values():
                    bring(upstream, log)
            with seats(count, shared, context.stop.is_set, log):
                manifest = _compute(context, stage, count, lock, log)
        context.tracker.finish(manifest)
        shutil.rmtree(project.work_folder() / stage.key, ignore_errors=True)
    manifest = replace(manifest, label=stage.label)
    context.note(manifest, cached)
    return manifest, cached


def shares(parallel: int) -> tuple[int, list[int]]:
    """How many cores each of so many stages gets, and which all of them share.

    Each gets as many, as no bit of a result may hang on which came first. What is left over stays
    free, or one stage more than that would compute.
    """
    allowed = project.cores()
    count = len(allowed) // parallel
    return count, allowed[: count * parallel]


def bring(manifest: Manifest, log: Callable[[str], None]) -> None:
    """Have the files of a stage here that a worker of a cluster has finished, proven.

    One thread fetches them, others that need them wait for it.

    Raises:
        StoreError: They are gone from the store.
    """
    with single_flight(manifest.key, log=log):
        found = cache.find(manifest.key, log)
    if found is None:
        raise store.StoreError(f"{manifest.key} is gone from the store; run again to compute it")


def _compute(
    context: Context, stage: Stage, cpus: int, lock: int, log: Callable[[str], None]
) -> Manifest:
    folder = project.work_folder() / stage.key
    folder.mkdir(parents=True, exist_ok=True)
    context.tracker.begin(stage)

    def on_event(event: children.Event) -> None:
        context.forecast.step(stage, event)
        display.show(stage.label, event)
        context.show_sweep()
        if event["event"] == "epoch":
            context.tracker.epochs(stage, folder / "out")

    try:
        job = _job(context.experiment, stage, cpus, folder)
        outcome = children.run_child(job, lock, on_event, context.stop)
        _refuse_other_samples(context.experiment, stage, folder)
    except BaseException as error:
        stopped = isinstance(error, StoppedError)
        context.forecast.interrupt(stage)
        context.tracker.interrupt(stage, "KILLED" if stopped else "FAILED")
        raise
    finally:
        display.end(stage.label)
    run_id = context.tracker.run_of(stage.key)
    return cache.publish(stage, folder / "out", outcome, run_id, log)


def _refuse_other_samples(experiment: Experiment, stage: Stage, work: Path) -> None:
    """Set a stage aside whose samples are no longer those that its key was made of.

    Raises:
        PassingError: They changed while it was computed.
    """
    samples = stage.inputs.get("data", stage)
    known = samples.settings.get("fingerprint")
    if known and definitions.fingerprint(experiment) != known:
        raise PassingError(
            f"the samples changed while {stage.label} was computed; set aside as"
            f" {project.set_aside(work)}, run again to compute it with what they are now"
        )


def _to_cut(experiment: Experiment, stage: Stage) -> str | dict[str, Any] | None:
    """Checkpoint or settings of the network that will be cut; None: the one that is trained."""
    settings = experiment.model.model_dump(mode="json")
    if not experiment.sparse.from_baseline:
        return settings
    teaches = stage.label.startswith(definitions.TEACHER)
    return (experiment.baseline.checkpoint or settings) if teaches else None


def _job(experiment: Experiment, stage: Stage, cpus: int, folder: Path) -> dict[str, Any]:
    """All a stage's process is told: settings, upstream files, and how to use the machine."""
    execution = experiment.execution
    together = stage.name in definitions.TRAINING
    processes = execution.processes if together else 1
    return {
        "stage": stage.name,
        "label": stage.label,
        "settings": stage.settings,
        "data": experiment.data.model_dump(mode="json"),
        "seed": experiment.seed,
        "ratios": experiment.ratios,
        "sparse": experiment.sparse.model_dump(mode="json"),
        "prune": experiment.prune.model_dump(mode="json"),
        "to_cut": _to_cut(experiment, stage),
        "checkpoint": definitions.checkpoint_of(experiment, stage),
        "inputs": {
            name: {"key": m.key, "file": str(m.file(m.result).resolve()), "sha256": m.digest}
            for name, m in stage.inputs.items()
        },
        "folder": str(folder),
        "cpus": max(1, cpus // processes),
        "processes": processes,
        "nodes": execution.nodes if together else 1,
        "rendezvous": execution.rendezvous,
        "launch": stage.key,
        "leads": True,
        "loader_workers": execution.loader_workers,
        "parent": os.getpid(),
    }
