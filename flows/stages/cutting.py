"""The stages that cut a network and say what it costs."""

from crnn.checkpoint import load_checkpoint
from crnn.devices import best_device
from crnn.evaluation import evaluate
from flows.cache import MODEL, WIDTHS
from flows.rows import ACCURACY
from flows.stages.sparse import plan
from flows.stages.work import Outcome, Work
from pruning.cost import as_it_ships, macs, parameters
from pruning.gammas import absolute_gammas, widths
from pruning.readiness import live_removed
from pruning.settings import PruneSettings
from pruning.slimming import slim
from pruning.surgery import revive


def prune(work: Work) -> Outcome:
    """Cut the sparse network at one ratio."""
    settings = PruneSettings.model_validate(work.settings["prune"])
    ratio = work.settings["basis_points"] / 10_000
    checkpoint, masks = plan(work.input("sparse"), ratio, settings)
    uncut = checkpoint.model
    live = live_removed(absolute_gammas(uncut), masks)
    revive(uncut, masks)
    before = evaluate(uncut.to(best_device()), work.lines("val"), work.unseen())
    model = slim(uncut.cpu(), masks, settings, work.lines("train") if settings.compensate else None)
    work.save_model(work.out / MODEL, model)
    work.write_summary(model)
    kept = {name: int(mask.sum()) for name, mask in zip(widths(uncut), masks, strict=True)}
    work.write_json(WIDTHS, kept)
    return MODEL, {
        "prune/ratio_requested": ratio,
        "prune/ratio_achieved": 1 - sum(kept.values()) / sum(widths(uncut).values()),
        "prune/channels_kept": float(sum(kept.values())),
        "prune/live_channels_removed": float(live),
        "prune/word_accuracy_before": before[ACCURACY],
        **evaluate(model.to(best_device()), work.lines("val"), work.unseen()),
    }


def measure(work: Work) -> Outcome:
    """Parameters and multiply-adds of a network as it ships, and the bytes of its files."""
    path = work.input("model")
    trained = load_checkpoint(path).model
    model = as_it_ships(trained)
    figures = {
        **{f"cost/params_{part}": float(count) for part, count in parameters(model).items()},
        "cost/macs": float(macs(model)),
        "cost/bytes": float(path.stat().st_size),
    }
    if model is not trained:
        figures["cost/params_trained"] = float(parameters(trained)["total"])
        figures["cost/macs_trained"] = float(macs(trained))
    if "export" in work.job["inputs"]:
        figures["cost/onnx_bytes"] = float(work.input("export").stat().st_size)
    work.write_json("cost.json", figures)
    return "cost.json", figures
