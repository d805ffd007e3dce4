"""Looking without computing: the data check, and what each ratio would cut."""

from pathlib import Path
from typing import Any

from crnn.errors import UserError
from flows import cache, definitions, display
from flows.cache import Manifest, Stage
from flows.experiment import Experiment


def check(experiment: Experiment) -> tuple[dict[str, dict[str, int]], list[dict[str, str]]]:
    """Check both splits: counts by split, and the bad samples."""
    from dataclasses import asdict

    from crnn.charset import Charset
    from crnn.data.check import check_split, training_charset
    from crnn.data.sources import open_source
    from crnn.networks.vgg import STRIDE

    settings = experiment.data
    sources = {s: open_source(settings, s, experiment.seed) for s in ("train", "val")}
    charset = (
        Charset.load(Path(settings.root) / settings.charset)
        if settings.charset
        else training_charset(sources["train"])
    )
    checks = {
        split: check_split(split, source, charset, settings.max_width, STRIDE)
        for split, source in sources.items()
    }
    counts = {s: {"total": c.total, "usable": len(c.indices)} for s, c in checks.items()}
    return counts, [asdict(sample) for c in checks.values() for sample in c.bad]


def preview(experiment: Experiment) -> list[dict[str, Any]]:
    """What each ratio would keep layer by layer, and cost, from the cached sparse stage.

    Raises:
        UserError: The sparse stage has not been computed, or a ratio is beyond the floors.
    """
    sparse = find_sparse(experiment)
    from crnn.checkpoint import load_checkpoint
    from flows.stages import start_of_cut
    from pruning.cost import macs, parameters
    from pruning.gammas import absolute_gammas
    from pruning.selection import keep_masks
    from pruning.surgery import cut

    cuts = []
    for ratio in experiment.ratios:
        uncut = load_checkpoint(start_of_cut(sparse.file(sparse.result), ratio)).model
        masks = keep_masks(absolute_gammas(uncut), ratio, experiment.prune)
        model = cut(uncut, masks)
        widths = [int(mask.sum()) for mask in masks]
        cuts.append(
            {
                "ratio": ratio,
                "ratio_achieved": 1 - sum(widths) / sum(len(m) for m in masks),
                "widths": widths,
                "params": parameters(model)["total"],
                "macs": macs(model),
                "bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
            }
        )
    return cuts


def find_sparse(experiment: Experiment) -> Manifest:
    """The cached sparse stage of an experiment, proven."""
    data = _found(definitions.data_stage(experiment))
    baseline = _found(definitions.baseline_stage(experiment, data))
    return _found(definitions.sparse_stage(experiment, data, baseline))


def _found(stage: Stage) -> Manifest:
    manifest = cache.find(stage.key, display.say)
    if manifest is None:
        raise UserError(
            f"stage {stage.label} of this experiment is not in the cache; compute it with:"
            " crnn-slim frontier PARAMS"
        )
    return manifest
