"""The Prefect flow: stages chained, and swept over prune ratios."""

import asyncio
import hashlib
import json
import os
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.futures import PrefectFuture
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from crnn.errors import CheckpointError, PassingError, SettingsError, StoppedError, UserError
from crnn.settings import ExportSettings, QuantizeSettings, Settings
from flows import cache, children, definitions, display, project, report, servers, store, tasks
from flows.cache import READINESS, Manifest
from flows.champion import crown
from flows.comparison import with_differences
from flows.experiment import LOCAL, ChampionSettings, ExecutionSettings, Experiment
from flows.flow_runs import artifact_key, attended
from flows.forecast import forecast_of
from flows.locks import single_flight
from flows.notice import notify
from flows.page import details_of
from flows.registry import Champion
from flows.rows import (
    BEST,
    CHAMPION,
    INT8,
    ONNX_LATENCY,
    QAT,
    Row,
    Variant,
    base_point,
    mean_of_seeds,
    row_of,
    times_of,
)
from flows.runners import runner
from flows.running import Context, bring, parallel_finetunes
from flows.server import is_own
from flows.tracking import Tracker
from flows.views import FRONTIER, page_of_view
from pruning.settings import PruneSettings, SparseSettings, units_removed

UI = "http://127.0.0.1:5000"
"""Where `crnn-slim ui` serves MLflow."""

INTERRUPTED, TERMINATED = "Interrupted", "Terminated"
"""Names of the Cancelled state after Ctrl-C and after SIGTERM."""

Networks = tuple[Context, list[Variant]]
"""Those of one seed."""

MAX_THREADS = 64
"""Tasks that wait at once; how many of them train at once is parallel_finetunes."""


@dataclass(frozen=True)
class Frontier:
    """A finished sweep.

    Attributes:
        rows: The baseline, and every network that was made of it or beside it.
        computed: Labels of the stages that had to be computed.
        sweep_run: MLflow run of the sweep, or None where MLflow could not be reached.
        charts: Address of its charts in MLflow, or None where MLflow could not be reached.
        report: Folder of its tables and plots.
        champion: Which model the registry names best, and why, in a sentence.
    """

    rows: list[Row]
    computed: list[str]
    sweep_run: str | None
    charts: str | None
    report: Path
    champion: str


@flow(
    flow_run_name="{experiment.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_THREADS),  # type: ignore[arg-type]
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
    project.configure_environment()  # A worker of Prefect's comes here directly.
    tracker = Tracker(experiment.name, display.say)
    forecast = forecast_of(experiment, parallel_finetunes(experiment))
    stop = threading.Event()
    context = Context(experiment, tracker, [], forecast, stop, experiment.training_seeds[0])
    try:
        with attended(experiment.name, forecast, stop):
            return _run(context)
    except KeyboardInterrupt:
        return Cancelled(name=INTERRUPTED, message=children.KEPT)
    except TerminationSignal:
        return Cancelled(name=TERMINATED, message=children.KEPT)
    except (CancelledRun, StoppedError):
        return Cancelled(message=children.KEPT)
    finally:
        display.end(display.SWEEP)


def _run(context: Context) -> Frontier:
    """Sweep by the runner that the experiment names, and tell of a failure whom it names."""
    experiment = context.experiment
    _warn_beyond_target(experiment)
    _warn_of_what_does_not_count(experiment)
    try:
        definitions.open_sources(experiment)  # Of a scheduled run nobody has looked at them yet.
        store.use(experiment.execution.store)
        _require_servers_for_all(experiment.execution)
        with runner(experiment.execution):
            try:
                return _persistently(context)
            finally:
                # First of all: the task runner waits for its threads, they for their processes.
                context.stop.set()
    except (CancelledRun, StoppedError):
        raise
    except Exception as error:
        event = {"event": "failed", "experiment": experiment.name, "reason": str(error)}
        notify(experiment.notify, event, display.say)
        raise


def _require_servers_for_all(execution: ExecutionSettings) -> None:
    """Refuse to work with other machines where they would not find the servers of this one."""
    if execution.store and is_own():
        raise SettingsError(
            "execution.store needs a Prefect server that all machines use, and there is none: set"
            " PREFECT_API_URL, or let `crnn-slim up` run on this one"
        )
    if execution.runner != LOCAL and os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite"):
        raise SettingsError(
            f"execution.runner: {execution.runner} needs an MLflow server that all machines use:"
            " set MLFLOW_TRACKING_URI"
        )


def _warn_beyond_target(experiment: Experiment) -> None:
    """Say, before it takes hours, which ratios `auto` will not have prepared a cut for."""
    target = experiment.sparse.target_ratio
    beyond = ", ".join(f"{ratio:g}" for ratio in experiment.ratios if ratio > target)
    if beyond and experiment.sparse.method == "auto":
        display.say(
            f"ratio {beyond} is above sparse.target_ratio {target:g}: live channels will go, and"
            " what they do is lost as far as fine-tuning does not regain it"
        )


def _warn_of_what_does_not_count(experiment: Experiment) -> None:
    """Say which of the settings have no effect, or not all that one would think."""
    sparse, prune, champion = experiment.sparse, experiment.prune, experiment.champion
    controls = experiment.controls.scratch or experiment.controls.small
    trained = definitions.checkpoints(experiment)
    given = experiment.baseline.checkpoint and sparse.from_baseline
    units = units_removed(experiment.model.hidden, prune.lstm_ratio)
    remarks = {
        f"{section} is not used: export is null": experiment.export is None
        and getattr(experiment, section) not in (None, _default(Experiment, section))
        for section in ("quantize", "champion")
    } | {
        "model is not used: the network is that of baseline.checkpoint": given
        and experiment.model != _default(Experiment, "model"),
        "finetune.distill is not used: finetune.epochs is 0": experiment.finetune.distill
        and not experiment.finetune.epochs,
        f"sparse.target_ratio {sparse.target_ratio:g} is not used: of {sparse.method} the strength"
        " decides how many channels come near zero": sparse.method != "auto"
        and sparse.target_ratio != _default(SparseSettings, "target_ratio"),
        "branches stay: prune.selection: reference keeps a channel of every layer": (
            sparse.drop_branches and prune.selection == "reference"
        ),
        "prune.calibration_lines is not used: prune.compensate is false": not prune.compensate
        and prune.calibration_lines != _default(PruneSettings, "calibration_lines"),
        f"prune.lstm_ratio {prune.lstm_ratio:g} cuts nothing: the LSTM has"
        f" {experiment.model.hidden} hidden units": prune.lstm_ratio and not units and not given,
        "champion.within is not used: the most_accurate may lose anything": champion
        and champion.rule == "most_accurate"
        and champion.within != _default(ChampionSettings, "within"),
        f"the controls get less than slimming had: what went into {' and '.join(trained)} before is"
        " not known, and not counted": controls and trained,
    }
    for remark, holds in remarks.items():
        if holds:
            display.say(remark)


def _default(settings: type[Settings], key: str) -> Any:
    return settings.model_fields[key].default


def _persistently(context: Context) -> Frontier:
    """Sweep, and try again after a failure that may pass, as often as the experiment says."""
    execution = context.experiment.execution
    for attempt in range(execution.retries):
        try:
            return _without_lease(context)
        except Exception as error:
            if isinstance(error, UserError | CancelledRun) and not isinstance(error, PassingError):
                raise
            seconds = execution.retry_seconds * 2**attempt
            display.say(f"{error}; tried again in {seconds:g} s, what is finished is kept")
            if context.stop.wait(seconds):
                raise StoppedError(f"stopped; {children.KEPT}") from error
    return _without_lease(context)


def _without_lease(context: Context) -> Frontier:
    """Sweep, also where Prefect would end a run whose lease it could not renew in time.

    The lease keeps runs of a deployment from overlapping, and a machine that slept or a server that
    was away loses it. Runs that do overlap compute nothing twice, and hours of work are at stake.
    """
    try:
        return _sweep(context)
    except asyncio.CancelledError:
        display.say(
            "Prefect did not renew this run's place in time; it goes on, and another run of this"
            " deployment may begin beside it"
        )
        return _sweep(context)


def _sweep(context: Context) -> Frontier:
    context.forecast.restart()
    samples = _result(context, tasks.data.submit(context))
    seeds = [replace(context, seed=seed) for seed in context.experiment.training_seeds]
    begun = [(seed, _start_until_sparse(seed, samples)) for seed in seeds]
    started = [
        (seed, _start_points(seed, _upstream(seed, _results(seed, stages))))
        for seed, stages in begun
    ]
    trained = [
        (seed, [Variant(point, _results(seed, stages)) for point, stages in points.items()])
        for seed, points in started
    ]
    shipped = _shipped(context.experiment, trained)
    # Latency needs a quiet machine: it is taken when nothing trains any more.
    measured = {seed.seed: _measured(seed, variants) for seed, variants in shipped}
    rows = with_differences(_of_all_seeds(measured), [variants for _, variants in shipped])
    folder, sweep_run = _publish(context, rows)
    figures_of = partial(_comparable, context, samples)
    # Of two sweeps that end at once, the second has to see the champion of the first.
    with single_flight(f"champion-{context.experiment.name}", context.stop.is_set, display.say):
        crowned = crown(context.experiment, context.tracker, rows, sweep_run, figures_of)
    if crowned.is_new:
        event = {"event": "champion", "experiment": context.experiment.name}
        notify(context.experiment.notify, {**event, "reason": crowned.sentence}, display.say)
    charts = _charts(context.tracker) if sweep_run else None
    return Frontier(rows, context.computed, sweep_run, charts, folder, crowned.sentence)


@dataclass(frozen=True)
class Upstream:
    """What the points of one seed start from.

    Attributes:
        stages: "data", "baseline" and, where there is one, "teacher".
        sparse: Where the cuts are made.
        points: Name and ratio of every cut, and the stage that found the ratio where one did.
    """

    stages: dict[str, Manifest]
    sparse: Manifest
    points: list[tuple[str, float, dict[str, Manifest]]]


def _start_until_sparse(context: Context, samples: Manifest) -> dict[str, Any]:
    """Begin what the cuts of one seed start from: its stages, as manifests or futures of them."""
    stages: dict[str, Any] = {"data": samples}
    if settings := context.experiment.teacher:
        stages["teacher"] = tasks.teacher.submit(context, settings, samples)
    stages["baseline"] = tasks.baseline.submit(context, {**stages})
    return {**stages, "sparse": tasks.sparse.submit(context, {**stages})}


def _upstream(context: Context, stages: dict[str, Manifest]) -> Upstream:
    """What the points of one seed start from, its points found."""
    thin = stages.pop("sparse")
    verdict = json.loads(thin.file(READINESS).read_text(encoding="utf-8"))
    display.say(f"{thin.label}: {verdict['sentence']}")
    return Upstream(stages, thin, _points(context, thin))


def _start_points(context: Context, upstream: Upstream) -> dict[str, dict[str, Any]]:
    """Make the cuts of one seed, and begin what is trained of them, and the controls.

    Returns:
        By the name of the point the stages behind it, as manifests or futures of them; the last
        makes its network.
    """
    samples, thin = upstream.stages["data"], upstream.sparse
    points: dict[str, dict[str, Any]] = {"baseline": upstream.stages}
    begun = [tasks.prune.submit(context, samples, thin, ratio) for _, ratio, _ in upstream.points]
    # A cut takes seconds: one that cannot be made is said before hours of training on the others.
    cuts = [_result(context, future) for future in begun]
    for (name, ratio, wish), pruned in zip(upstream.points, cuts, strict=True):
        made_of = {**upstream.stages, "prune": pruned}
        tuning = tasks.finetune.submit(context, ratio, made_of)
        stages = {"data": samples, "sparse": thin, **wish, "prune": pruned, "finetune": tuning}
        points[name] = stages
        for kind in [] if wish else context.experiment.controls.kinds(ratio):
            training = tasks.control.submit(context, kind, ratio, made_of)
            points[f"{kind} {name}"] = {**made_of, kind: training}
    return points


def _points(context: Context, thin: Manifest) -> list[tuple[str, float, dict[str, Manifest]]]:
    """Name and ratio of every cut, and the stage that found the ratio where one did."""
    experiment = context.experiment
    points: list[tuple[str, float, dict[str, Manifest]]] = [
        (f"{ratio:g}", ratio, {}) for ratio in experiment.ratios
    ]
    for kind, value in experiment.prune.targets.wishes().items():
        found = _result(context, tasks.target.submit(context, thin, kind, value))
        name = definitions.point_of_target(kind, value)
        points.append((name, found.metrics["target/ratio"], {"target": found}))
    return points


def _result(context: Context, future: PrefectFuture[Any]) -> Manifest:
    manifest: Manifest = future.result()
    is_new = future.task_run_id not in context.collected
    if context.experiment.execution.runner != LOCAL and is_new:  # Here, its thread has done this.
        context.collected.add(future.task_run_id)
        bring(manifest, display.say)
        context.tracker.finish(manifest)
        context.note(manifest, cached=future.state.name == tasks.CACHED)
    return manifest


def _results(context: Context, stages: dict[str, Any]) -> dict[str, Manifest]:
    return {n: s if isinstance(s, Manifest) else _result(context, s) for n, s in stages.items()}


def _shipped(experiment: Experiment, trained: list[Networks]) -> list[Networks]:
    """All networks in the forms in which they ship, the same forms for every seed."""
    if not (settings := experiment.export):
        return trained
    exported = [_exported(settings, *networks) for networks in trained]
    if not (rounding := experiment.quantize):
        return exported
    rounded = [_rounded(rounding, *networks) for networks in exported]
    fell_short = _fell_short(rounding, rounded)
    chosen = [(seed, [n for n in networks if n.point in fell_short]) for seed, networks in trained]
    more = len(fell_short) * len(trained)
    trained[0][0].forecast.add({"qat": more, "export": more, "int8": more, "measure": more})
    again = [_trained_for_8_bits(rounding, *networks) for networks in chosen]
    again = [_exported(settings, *networks) for networks in again]
    again = [_rounded(rounding, *networks) for networks in again]
    in_order = {network.point: place for place, network in enumerate(trained[0][1])}
    return [
        (seed, sorted([*networks, *ints, *more], key=lambda n: in_order[base_point(n.point)]))
        for (seed, networks), (_, ints), (_, more) in zip(exported, rounded, again, strict=True)
    ]


def _fell_short(settings: QuantizeSettings, rounded: list[Networks]) -> set[str]:
    """Points for which some seed's network had to stay in float in part."""
    return {
        base_point(network.point)
        for _, networks in rounded
        for network in networks
        if settings.epochs and network.exported
        if network.exported.metrics["quantize/layers_in_float"]
    }


def _exported(settings: ExportSettings, context: Context, networks: list[Variant]) -> Networks:
    made = _of_each(networks, tasks.export, context, settings)
    return context, [replace(network, exported=file) for network, file in made]


def _rounded(settings: QuantizeSettings, context: Context, networks: list[Variant]) -> Networks:
    made = _of_each(networks, tasks.int8, context, settings)
    return context, [
        replace(network, point=f"{network.point}{INT8}", exported=file) for network, file in made
    ]


def _trained_for_8_bits(
    settings: QuantizeSettings, context: Context, networks: list[Variant]
) -> Networks:
    made = _of_each(networks, tasks.qat, context, settings)
    return context, [
        Variant(f"{network.point}{QAT}", {**network.stages, "qat": trained})
        for network, trained in made
    ]


def _of_each(
    networks: list[Variant], task: Any, context: Context, settings: Settings
) -> list[tuple[Variant, Manifest]]:
    """Each network with what a stage makes of it, all of them side by side."""
    begun = [task.submit(context, settings, network) for network in networks]
    return [(n, _result(context, future)) for n, future in zip(networks, begun, strict=True)]


def _measured(context: Context, networks: list[Variant]) -> list[Row]:
    """The rows of one seed."""
    costs = [_result(context, tasks.measure.submit(context, network)) for network in networks]
    times = _result(context, tasks.latency.submit(context, networks))
    return [row_of(network, cost, times) for network, cost in zip(networks, costs, strict=True)]


def _of_all_seeds(measured: dict[int, list[Row]]) -> list[Row]:
    """The rows of the frontier: means over the seeds, and which of them are best."""
    of_points = zip(*measured.values(), strict=True)
    means = [mean_of_seeds(dict(zip(measured, point, strict=True))) for point in of_points]
    for row, best in zip(means, report.pareto(means), strict=True):
        row["pareto"] = best
    return means


def _publish(context: Context, rows: list[Row]) -> tuple[Path, str | None]:
    """Write the report, record the sweep in MLflow, and show the table in Prefect.

    Returns:
        The report's folder, and the sweep's run where MLflow could be reached.
    """
    experiment = context.experiment
    # What is recorded is never changed: a point that was measured anew makes another sweep, and so
    # do the settings that no stage depends on, but the page and the model card show.
    shown = experiment.model_dump(mode="json", include={"champion": True, "data": {"licence"}})
    content = json.dumps([experiment.name, rows, shown])
    key = f"sweep-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = project.reports_folder() / experiment.name / key
    details = partial(details_of, experiment, rows, context.computed)
    report.write_report(folder, experiment.name, rows, details)
    cuts = [row["point"] for row in rows if row.get("prune/live_channels_removed") is not None]
    name = f"{experiment.name} {cuts[0]} to {cuts[-1]}"
    # Whom to tell may be an address that nobody else should know.
    params = experiment.model_dump(mode="json", exclude={"execution", "notify"})
    sweep_run = context.tracker.sweep(name, key, rows, params, folder)
    header, cells = report.table_cells(rows)
    create_table_artifact(
        [dict(zip(header, line, strict=True)) for line in cells],
        key=artifact_key("frontier", experiment.name),
        description=_links(context.tracker, rows, sweep_run),
    )
    return folder, sweep_run


def _comparable(context: Context, samples: Manifest, reigning: Champion, best: Row) -> Row | None:
    """Figures of the present champion on the val lines of a sweep, timed beside its best point.

    None where its file is needed for that and not here.
    """
    settings, figures = context.experiment.champion, dict(reigning.figures)
    same_lines, timed = reigning.data == samples.key, settings and settings.rule == "fastest"
    if same_lines and not timed:
        return figures
    exported = cache.find(reigning.key, display.say)
    if exported is None:
        return None
    try:
        if not same_lines:
            figures |= _result(context, tasks.judge.submit(context, samples, exported)).metrics
        if timed:
            figures |= _timed_beside(context, exported, best)
    except CheckpointError as error:  # Written by another version of this project.
        display.say(str(error))
        return None
    return figures


def _timed_beside(context: Context, champion: Manifest, best: Row) -> Row:
    """Latency of the champion, in proportion to what the best point is stated to take.

    What it took when it was crowned says little: another machine, or other work beside it.
    """
    file = cache.verified((project.home() / best["onnx"]).parent)
    times = times_of(_result(context, tasks.duel.submit(context, champion, file)))
    of_champion, of_best = (times[name][ONNX_LATENCY] for name in (CHAMPION, BEST))
    return {ONNX_LATENCY: best[ONNX_LATENCY] * of_champion / of_best}


def _links(tracker: Tracker, rows: list[Row], sweep_run: str | None) -> str:
    """Markdown list of the MLflow runs behind a frontier."""
    runs = {"sweep": sweep_run}
    for row in rows:
        runs |= {f"{stage} {row['point']}": tracker.run_of(k) for stage, k in row["stages"].items()}
    experiment = f"{_mlflow()}/#/experiments/{tracker.experiment_id}"
    links = [f"- [{name}]({experiment}/runs/{run})" for name, run in runs.items() if run]
    return "\n".join(["MLflow runs (`crnn-slim ui` serves them):", *links])


def _charts(tracker: Tracker) -> str:
    return f"{_mlflow()}/{page_of_view(str(tracker.experiment_id), FRONTIER)}"


def _mlflow() -> str:
    """Address of MLflow's pages: where they are, or where they will be once they are served."""
    server, there = os.environ["MLFLOW_TRACKING_URI"], servers.running()
    return server if server.startswith("http") else there.mlflow if there else UI
