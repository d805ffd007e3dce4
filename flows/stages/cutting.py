"""The stages that cut a network and say what it costs."""

from pathlib import Path

from crnn.checkpoint import Checkpoint, load_checkpoint
from crnn.devices import best_device
from crnn.evaluation import evaluate
from flows.cache import MODEL
from flows.stages.training import start_of_cut
from flows.stages.work import Outcome, Work
from pruning.cost import latency_ms, macs, parameters
from pruning.gammas import widths
from pruning.settings import PruneSettings
from pruning.slimming import slim


def uncut_at(index: Path, ratio: float) -> Checkpoint:
    """The uncut network to cut at a ratio, from the result file of the sparse stage."""
    return load_checkpoint(start_of_cut(index, ratio))


def prune(work: Work) -> Outcome:
    """Cut the sparse network at one ratio."""
    settings = PruneSettings.model_validate(work.settings["prune"])
    ratio = work.settings["basis_points"] / 10_000
    uncut = uncut_at(work.input("sparse"), ratio).model
    model = slim(uncut, ratio, settings, work.lines("train") if settings.compensate else None)
    work.save_model(work.out / MODEL, model)
    work.write_summary(model)
    kept = widths(model)
    work.write_json("widths.json", kept)
    return MODEL, {
        "prune/ratio_requested": ratio,
        "prune/ratio_achieved": 1 - sum(kept.values()) / sum(widths(uncut).values()),
        "prune/channels_kept": float(sum(kept.values())),
        **evaluate(model.to(best_device()), work.lines("val"), work.unseen()),
    }


def measure(work: Work) -> Outcome:
    """Parameters, multiply-adds, bytes and latency of a network."""
    path = work.input("model")
    model = load_checkpoint(path).model
    figures = {
        **{f"cost/params_{part}": float(count) for part, count in parameters(model).items()},
        "cost/macs": float(macs(model)),
        "cost/bytes": float(path.stat().st_size),
        "cost/latency_ms": latency_ms(model),
    }
    work.write_json("cost.json", figures)
    return "cost.json", figures
