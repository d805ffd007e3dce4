"""The Prefect tasks: each finds or computes one stage."""

from contextlib import nullcontext
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, Completed

from crnn.errors import StoppedError
from crnn.settings import ExportSettings, QuantizeSettings, TeacherSettings
from flows import definitions, display
from flows.cache import Manifest, Stage
from flows.flow_runs import watched
from flows.rows import Variant
from flows.running import Context, find_or_compute

CACHED = "Cached"
"""Name of the state of a task that computed nothing."""


@task(cache_policy=NO_CACHE, task_run_name="data")
def data(context: Context) -> Any:
    """Check and index the samples."""
    return _run_stage(context, definitions.data_stage(context.experiment, context.stop.is_set))


@task(cache_policy=NO_CACHE, task_run_name="teacher{context.of_seed}")
def teacher(context: Context, settings: TeacherSettings, samples: Manifest) -> Any:
    """Train the network that teaches."""
    stage = definitions.teacher_stage(context.experiment, settings, samples, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="baseline{context.of_seed}")
def baseline(context: Context, upstream: dict[str, Any]) -> Any:
    """Train the uncut network."""
    stage = definitions.baseline_stage(context.experiment, upstream, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="sparse{context.of_seed}")
def sparse(context: Context, upstream: dict[str, Any]) -> Any:
    """Train with the sparsity penalty."""
    stage = definitions.sparse_stage(context.experiment, upstream, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="target {kind} {value}{context.of_seed}")
def target(context: Context, thin: Manifest, kind: str, value: float) -> Any:
    """Find the ratio that meets a target."""
    stage = definitions.target_stage(context.experiment, thin, kind, value, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="prune {ratio}{context.of_seed}")
def prune(context: Context, samples: Manifest, thin: Manifest, ratio: float) -> Any:
    """Cut the channels of one ratio."""
    stage = definitions.prune_stage(context.experiment, samples, thin, ratio, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="finetune {ratio}{context.of_seed}")
def finetune(context: Context, ratio: float, upstream: dict[str, Any]) -> Any:
    """Train the cut network on."""
    stage = definitions.finetune_stage(context.experiment, upstream, ratio, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="{kind} {ratio}{context.of_seed}")
def control(context: Context, kind: str, ratio: float, upstream: dict[str, Any]) -> Any:
    """Train a network that was not slimmed as long as one that was."""
    stage = definitions.control_stage(context.experiment, kind, upstream, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="export {variant.model.label}")
def export(context: Context, settings: ExportSettings, variant: Variant) -> Any:
    """Write a network for other runtimes."""
    stage = definitions.export_stage(settings, variant.stages)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="int8 {variant.model.label}")
def int8(context: Context, settings: QuantizeSettings, variant: Variant) -> Any:
    """Quantize an export."""
    stage = definitions.int8_stage(settings, variant, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="qat {variant.model.label}")
def qat(context: Context, settings: QuantizeSettings, variant: Variant) -> Any:
    """Train a network on for 8 bits."""
    stage = definitions.qat_stage(settings, variant, context.seed)
    return _run_stage(context, stage)


@task(cache_policy=NO_CACHE, task_run_name="judge {exported.label}")
def judge(context: Context, data: Manifest, exported: Manifest) -> Any:
    """Read the val lines with an earlier export."""
    return _run_stage(context, definitions.judge_stage(data, exported))


@task(cache_policy=NO_CACHE, task_run_name="measure {variant.label}")
def measure(context: Context, variant: Variant) -> Any:
    """Parameters, multiply-adds, bytes."""
    return _run_stage(context, definitions.measure_stage(variant))


@task(cache_policy=NO_CACHE, task_run_name="latency {champion.label} and {best.label}")
def duel(context: Context, champion: Manifest, best: Manifest) -> Any:
    """Time the champion beside what may take its place."""
    return _run_stage(context, definitions.duel_stage(champion, best))


@task(cache_policy=NO_CACHE, task_run_name="latency{context.of_seed}")
def latency(context: Context, variants: list[Variant]) -> Any:
    """Time all networks side by side."""
    stage = definitions.latency_stage(context.experiment, variants, context.seed)
    return _run_stage(context, stage)


def _run_stage(context: Context, stage: Stage) -> Any:
    """Find a stage's result, or compute it in a process of its own.

    Args:
        context: Of the flow run.
        stage: What to compute.

    Returns:
        A completed state that holds the manifest; its name is CACHED where nothing was computed.
    """
    logger = get_run_logger()

    def log(message: str) -> None:
        logger.warning(message)
        display.say(message)

    try:
        with watched(context.stop) if context.elsewhere else nullcontext():
            manifest, cached = find_or_compute(context, stage, log)
    except StoppedError as stopped:
        return Cancelled(message=str(stopped))
    if cached:
        return Completed(name=CACHED, message=f"verified {stage.key}", data=manifest)
    return Completed(message=stage.key, data=manifest)
