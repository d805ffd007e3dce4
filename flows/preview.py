"""Looking without computing: the data check, and what each ratio would cut."""

import json
from dataclasses import asdict, replace
from typing import Any

from crnn.errors import UserError
from flows import cache, definitions, display, store
from flows.cache import Manifest, Stage
from flows.experiment import Experiment


def check(experiment: Experiment) -> tuple[dict[str, dict[str, int]], list[dict[str, str]]]:
    """Check both splits: counts by split, and the bad samples.

    Raises:
        DataError: A split without a usable sample.
    """
    from crnn.data.check import check_splits, refuse_empty
    from crnn.networks.vgg import STRIDE

    def show(split: str, done: int, total: int) -> None:
        event = {"event": "step", "phase": f"checking {split}", "step": done, "steps": total}
        display.show("check-data", event)

    definitions.open_sources(experiment)
    charset = definitions.given_charset(experiment.data)
    checked = check_splits(experiment.data, experiment.seed, charset, STRIDE, show)
    display.end("check-data")
    bad = [asdict(sample) for check in checked.splits.values() for sample in check.bad]
    if not bad:
        refuse_empty(checked.splits)
    return {split: check.counts for split, check in checked.splits.items()}, bad


def preview(experiment: Experiment) -> dict[str, Any]:
    """The verdict of the sparse stage, and what each ratio and target would keep and cost.

    Raises:
        UserError: The sparse stage has not been computed, or a ratio or rank cannot be.
    """
    sparse = find_sparse(experiment)
    from crnn.checkpoint import checkpoint_bytes
    from flows.stages.sparse import free_ratio, plan
    from flows.stages.targets import figures
    from pruning.cost import as_it_ships, macs, parameters
    from pruning.gammas import absolute_gammas, widths
    from pruning.readiness import live_removed
    from pruning.slimming import slim

    index, seed = sparse.file(sparse.result), experiment.training_seeds[0]
    points: list[tuple[str, float, dict[str, float]]] = [
        (f"{ratio:g}", ratio, {}) for ratio in experiment.ratios
    ]
    for kind, value in experiment.prune.targets.wishes().items():
        stage = definitions.target_stage(experiment, sparse, kind, value, seed)
        # A latency that was found stays found, whatever it would be now.
        found = cache.find(stage.key, display.say)
        wish = found.metrics if found else figures(index, kind, value, experiment.prune)
        points.append((definitions.point_of_target(kind, value), wish["target/ratio"], wish))
    cuts = []
    for point, ratio, wish in points:
        uncut, masks = plan(index, ratio, experiment.prune)
        model = slim(uncut.model, masks, experiment.prune)
        kept, shipped = [int(mask.sum()) for mask in masks], as_it_ships(model)
        cuts.append(
            {
                "point": point,
                "ratio": ratio,
                **wish,
                "ratio_achieved": 1 - sum(kept) / sum(widths(uncut.model).values()),
                "widths": kept,
                "live_removed": live_removed(absolute_gammas(uncut.model), masks),
                "params": parameters(shipped)["total"],
                "macs": macs(shipped),
                "bytes": len(checkpoint_bytes(replace(uncut, model=model, stage="finetune"))),
            }
        )
    verdict = json.loads(sparse.file(cache.READINESS).read_text(encoding="utf-8"))
    return {"readiness": verdict, "free_ratio": free_ratio(index, experiment.prune), "cuts": cuts}


def find_sparse(experiment: Experiment) -> Manifest:
    """The cached sparse stage of an experiment, of its first seed, proven."""
    store.use(experiment.execution.store)
    seed = experiment.training_seeds[0]
    stages = {"data": _found(definitions.data_stage(experiment))}
    if teacher := experiment.teacher:
        stage = definitions.teacher_stage(experiment, teacher, stages["data"], seed)
        stages["teacher"] = _found(stage)
    stages["baseline"] = _found(definitions.baseline_stage(experiment, stages, seed))
    return _found(definitions.sparse_stage(experiment, stages, seed))


def _found(stage: Stage) -> Manifest:
    manifest = cache.find(stage.key, display.say)
    if manifest is None:
        raise UserError(
            f"stage {stage.label} of this experiment is not in the cache; compute it with:"
            " crnn-slim frontier PARAMS"
        )
    return manifest
