"""What each stage computes, in a process of its own. Knows nothing of Prefect or MLflow.

A job names its settings, the result files of its upstream stages, and a work folder. Finished
files go to the work folder's `out`; a training also keeps its state there to resume from.
"""

import csv
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchinfo import summary

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, load_checkpoint, load_run, save_checkpoint, save_run
from crnn.data.batches import Lines, evaluation_batches, normalise
from crnn.data.check import Checked, check_split, refuse_bad, training_charset
from crnn.data.images import HEIGHT
from crnn.data.sources import Source, open_source
from crnn.devices import best_device, describe
from crnn.errors import CheckpointError, DataError
from crnn.evaluation import evaluate
from crnn.files import write_atomic
from crnn.networks.recogniser import Recogniser
from crnn.networks.vgg import STRIDE
from crnn.settings import BaselineSettings, DataSettings, ModelSettings, TrainSettings
from crnn.training import Penalty, fit, start
from pruning.cost import LINE_WIDTH, latency_ms, macs, parameters
from pruning.gammas import absolute_gammas, gamma_statistics, prunable, share_zero
from pruning.selection import keep_masks
from pruning.settings import PruneSettings, SparseSettings
from pruning.sparsity import penalty_of
from pruning.surgery import cut, mean_activations

Emit = Callable[[dict[str, Any]], None]
HISTORY = "history.jsonl"
MODEL = "model.safetensors"
SNAPSHOTS = "snapshots"
SNAPSHOT_STEP = 500
"""Basis points of zeros between two snapshots of a sparse stage."""

LINES = "lines.npz"


@dataclass(frozen=True)
class Work:
    """A stage under way.

    Attributes:
        job: As the parent wrote it.
        folder: Resumable state.
        out: Files of the finished stage.
        emit: Sends a progress event to the parent.
    """

    job: dict[str, Any]
    folder: Path
    out: Path
    emit: Emit

    def input(self, stage: str) -> Path:
        """Result file of an upstream stage."""
        return Path(self.job["inputs"][stage])

    @property
    def settings(self) -> dict[str, Any]:
        """All that shapes the result."""
        settings: dict[str, Any] = self.job["settings"]
        return settings


def compute(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Run the stage a job names.

    Returns:
        `result`, the name of the file that later stages read; `metrics`; `seconds` over all
        attempts.
    """
    begun = time.perf_counter()
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    work = Work(job, folder, folder / "out", emit)
    work.out.mkdir(exist_ok=True)
    before = _seconds_so_far(folder)
    stage = {
        "data": data,
        "baseline": baseline,
        "sparse": sparse,
        "prune": prune,
        "finetune": finetune,
        "measure": measure,
    }[job["stage"]]
    result, metrics = stage(work)
    write_atomic(work.out / "settings.json", json.dumps(work.settings, indent=1).encode())
    write_atomic(work.out / "environment.json", json.dumps(_environment(), indent=1).encode())
    return {
        "result": result,
        "metrics": metrics,
        "seconds": round(before + time.perf_counter() - begun, 3),
    }


def _seconds_so_far(folder: Path) -> float:
    """Training time of earlier attempts at this stage."""
    return sum(record["train/seconds"] for record in _history(folder / "out" / HISTORY))


def _environment() -> dict[str, Any]:
    packages = ("torch", "numpy", "pillow", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": describe(best_device()),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        **{name: version(name) for name in packages},
    }


# --- data -----------------------------------------------------------------------------------


def data(work: Work) -> tuple[str, dict[str, float]]:
    """Check every sample, and index the usable ones."""
    settings = DataSettings.model_validate(work.job["data"])
    train = open_source(settings, "train", work.job["seed"])
    val = open_source(settings, "val", work.job["seed"])
    charset = (
        Charset(work.settings["charset"]) if work.settings["charset"] else training_charset(train)
    )
    checks = {}
    for split, source in (("train", train), ("val", val)):
        _refuse_empty(split, len(source))
        checks[split] = check_split(
            split, source, charset, settings.max_width, STRIDE, _sample_events(work, split)
        )
    _write_check(work.out, checks)
    if settings.on_bad_sample == "refuse":
        refuse_bad(list(checks.values()))
    for split, check in checks.items():
        _refuse_empty(split, len(check.indices))
    seen = _label_hashes(train, checks["train"].indices)
    new = ~np.isin(_label_hashes(val, checks["val"].indices), seen)
    arrays = {
        f"{s}_{part}": getattr(c, part) for s, c in checks.items() for part in ("indices", "widths")
    }
    write_atomic(work.out / "charset.txt", charset.characters.encode())
    np.savez(
        work.out / LINES,
        fingerprint=np.array(work.settings["fingerprint"]),
        charset=np.array(list(charset.characters)),
        max_width=np.array(settings.max_width),
        val_unseen=checks["val"].indices[new],
        **arrays,
    )
    return LINES, {
        "data/train_samples": float(len(checks["train"].indices)),
        "data/val_samples": float(len(checks["val"].indices)),
        "data/bad_samples": float(sum(len(c.bad) for c in checks.values())),
        "data/classes": float(charset.classes),
    }


def _label_hashes(source: Source, indices: np.ndarray) -> np.ndarray:
    """64 bits of each label: little memory for millions, and enough to tell them apart."""
    hashes = (
        int.from_bytes(blake2b(source.label(int(i)).encode(), digest_size=8).digest())
        for i in indices
    )
    return np.fromiter(hashes, np.uint64, len(indices))


def _refuse_empty(split: str, samples: int) -> None:
    if samples == 0:
        raise DataError(f"the {split} split has no usable sample; check data.root and data.{split}")


def _sample_events(work: Work, split: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        work.emit({"event": "step", "phase": f"checking {split}", "step": done, "steps": total})

    return report


def _write_check(out: Path, checks: dict[str, Checked]) -> None:
    """The counts as JSON, and one line for each bad sample as CSV."""
    counts = {
        split: {"total": check.total, "usable": len(check.indices), "bad": len(check.bad)}
        for split, check in checks.items()
    }
    write_atomic(out / "check.json", json.dumps(counts, indent=1).encode())
    with (out / "bad_samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "name", "reason", "detail"])
        writer.writerows(
            [b.split, b.name, b.reason, b.detail] for check in checks.values() for b in check.bad
        )


def _lines(work: Work, split: str) -> Lines:
    """The usable samples of a split, as the data stage indexed them."""
    settings = DataSettings.model_validate(work.job["data"])
    with np.load(work.input("data")) as index:
        return Lines(
            source=open_source(settings, split, work.job["seed"]),
            indices=index[f"{split}_indices"],
            widths=index[f"{split}_widths"],
            charset=Charset("".join(index["charset"])),
            max_width=int(index["max_width"]),
            workers=work.job["loader_workers"],
        )


def _unseen(work: Work) -> set[int]:
    with np.load(work.input("data")) as index:
        return set(index["val_unseen"].tolist())


# --- training -------------------------------------------------------------------------------


def baseline(work: Work) -> tuple[str, dict[str, float]]:
    """Train the uncut network, from scratch or from a checkpoint."""
    model = _given_model(work) if "checkpoint" in work.settings else _fresh_model(work)
    _refuse_unreachable_ratios(work, model)
    _write_summary(work.out, model)
    settings = {**work.settings["train"], "checkpoint": work.job["checkpoint"]}
    return _train(work, model, BaselineSettings.model_validate(settings))


def _given_model(work: Work) -> Recogniser:
    path = Path(work.job["checkpoint"])
    given, charset = load_checkpoint(path), _lines(work, "train").charset
    if given.charset != charset:
        raise CheckpointError(
            f"checkpoint {path} reads {len(given.charset.characters)} characters, the data has"
            f" {len(charset.characters)}, and they are not the same; set data.charset to the"
            " charset the checkpoint was trained with"
        )
    return given.model


def sparse(work: Work) -> tuple[str, dict[str, float]]:
    """Train with a penalty on the BatchNorm scales.

    The last epoch serves the highest ratio. A network with that many dead channels is no start
    for a lower one, so the way there is kept: a snapshot each time the share of zeros passes a
    multiple of SNAPSHOT_STEP.
    """
    settings = SparseSettings.model_validate(work.settings["train"])
    if settings.from_baseline:
        model = load_checkpoint(work.input("baseline")).model
    else:
        model = _fresh_model(work)
    _refuse_unreachable_ratios(work, model)
    return _train(work, model, settings, penalty_of(settings), _snapshots(work))


def _snapshots(work: Work) -> Callable[[Recogniser], None]:
    """A function that saves the network where its zeros have reached the next step.

    A resumed stage finds the snapshots of the epoch it repeats, which would be the same bits.
    """
    folder = work.out / SNAPSHOTS
    folder.mkdir(exist_ok=True)
    taken = max(_zeros_of(folder), default=-1)

    def save_where_due(model: Recogniser) -> None:
        nonlocal taken
        zeros = int(10_000 * share_zero(model))
        if taken < 0 or zeros // SNAPSHOT_STEP > taken // SNAPSHOT_STEP:
            _save_model(work, folder / f"zeros-{zeros:04d}.safetensors", model)
            taken = zeros

    return save_where_due


def _zeros_of(folder: Path) -> dict[int, Path]:
    """Snapshots by their share of zeros in basis points."""
    return {int(path.stem.removeprefix("zeros-")): path for path in folder.glob("zeros-*")}


def start_of_cut(sparse: Path, ratio: float) -> Path:
    """The network of a sparse stage to cut at a ratio: the sparsest with no zero to spare.

    Args:
        sparse: Result file of the stage, its last epoch; snapshots lie beside it.
        ratio: Prune ratio.
    """
    last = share_zero(load_checkpoint(sparse).model)
    if last <= ratio:
        return sparse
    snapshots = _zeros_of(sparse.parent / SNAPSHOTS)
    fitting = [zeros for zeros in snapshots if zeros <= round(10_000 * ratio)]
    return snapshots[max(fitting)] if fitting else sparse


def finetune(work: Work) -> tuple[str, dict[str, float]]:
    """Train the cut network on."""
    model = load_checkpoint(work.input("prune")).model
    return _train(work, model, TrainSettings.model_validate(work.settings["train"]))


def _refuse_unreachable_ratios(work: Work, model: Recogniser) -> None:
    """Before hours of training: the floors must leave room for the highest ratio."""
    settings = PruneSettings.model_validate(work.job["prune"])
    keep_masks(absolute_gammas(model), max(work.job["ratios"]), settings)


def _fresh_model(work: Work) -> Recogniser:
    torch.manual_seed(work.settings["seed"])
    settings = ModelSettings.model_validate(work.settings["model"])
    return Recogniser(settings, _lines(work, "train").charset.classes)


def _train(
    work: Work,
    model: Recogniser,
    settings: TrainSettings,
    penalty: Penalty | None = None,
    look: Callable[[Recogniser], None] | None = None,
) -> tuple[str, dict[str, float]]:
    """Train from the last finished epoch of this stage, or from its beginning; look each step.

    After each epoch its record is written before its state, and a resumed run drops records past
    the state: no epoch is recorded twice, none is missing.
    """
    lines, val, unseen = _lines(work, "train"), _lines(work, "val"), _unseen(work)
    model = model.to(best_device())
    state = work.folder / "state.safetensors"
    if state.exists():
        run = load_run(state, model, settings)
    else:
        run = start(model, settings, work.settings["seed"])
    records = _history(work.out / HISTORY)[: run.epoch]
    _write_history(work.out / HISTORY, records)

    def after_epoch(metrics: dict[str, float]) -> None:
        scores = evaluate(run.model, val, unseen)
        record = {"epoch": run.epoch, **metrics, **scores, **gamma_statistics(run.model)}
        records.append(record)
        _save_gammas(work.out, run.model, run.epoch)
        _write_history(work.out / HISTORY, records)
        save_run(state, run)
        work.emit({"event": "epoch", "epochs": settings.epochs, **record})

    def after_step(step: int, steps: int, loss: float) -> None:
        if look:
            look(run.model)
        work.emit(
            {
                "event": "step",
                "phase": f"epoch {run.epoch + 1}/{settings.epochs}",
                "step": run.epoch * steps + step,
                "steps": settings.epochs * steps,
                "loss": loss,
            }
        )

    work.emit({"event": "begin", "epoch": run.epoch, "epochs": settings.epochs})
    fit(run, lines, settings, penalty, after_step, after_epoch)
    _save_model(work, work.out / MODEL, run.model)
    if not records:
        return MODEL, {**evaluate(run.model, val, unseen), **gamma_statistics(run.model)}
    return MODEL, {name: value for name, value in records[-1].items() if name != "epoch"}


def _save_model(work: Work, path: Path, model: Recogniser) -> None:
    with np.load(work.input("data")) as index:
        charset, max_width = Charset("".join(index["charset"])), int(index["max_width"])
    save_checkpoint(path, Checkpoint(model, charset, max_width, work.job["stage"]))


def _history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_history(path: Path, records: list[dict[str, float]]) -> None:
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _save_gammas(out: Path, model: Recogniser, epoch: int) -> None:
    """Raw |gamma| of every layer after an epoch."""
    arrays: dict[str, Any] = {
        name: gamma.float().cpu().numpy()
        for name, gamma in zip(prunable(model), absolute_gammas(model), strict=True)
    }
    (out / "gammas").mkdir(exist_ok=True)
    np.savez(out / "gammas" / f"epoch-{epoch:04d}.npz", **arrays)


def _write_summary(out: Path, model: Recogniser) -> None:
    shape = (1, 3, HEIGHT, LINE_WIDTH)
    table = summary(model, shape, device="cpu", verbose=0, depth=3)
    write_atomic(out / "summary.txt", f"{table}\n".encode())


# --- cutting --------------------------------------------------------------------------------


def prune(work: Work) -> tuple[str, dict[str, float]]:
    """Cut the channels of one ratio out of the sparse network."""
    settings = PruneSettings.model_validate(work.settings["prune"])
    uncut = load_checkpoint(start_of_cut(work.input("sparse"), work.settings["ratio"])).model
    masks = keep_masks(absolute_gammas(uncut), work.settings["ratio"], settings)
    means = None
    if settings.compensate:
        train = _lines(work, "train")
        batches = evaluation_batches(train.sample(settings.calibration_lines))
        means = mean_activations(uncut, (normalise(batch.images) for batch in batches))
    model = cut(uncut, masks, means)
    _save_model(work, work.out / MODEL, model)
    _write_summary(work.out, model)
    kept = {name: int(mask.sum()) for name, mask in zip(prunable(model), masks, strict=True)}
    write_atomic(work.out / "widths.json", json.dumps(kept, indent=1).encode())
    total = sum(len(mask) for mask in masks)
    scores = evaluate(model, _lines(work, "val"), _unseen(work))
    return MODEL, {
        "prune/ratio_requested": work.settings["ratio"],
        "prune/ratio_achieved": 1 - sum(kept.values()) / total,
        "prune/channels_kept": float(sum(kept.values())),
        **scores,
    }


def measure(work: Work) -> tuple[str, dict[str, float]]:
    """Parameters, multiply-adds, bytes and latency of a network."""
    path = work.input("model")
    model = load_checkpoint(path).model
    parts = parameters(model)
    metrics = {
        **{f"cost/params_{part}": float(count) for part, count in parts.items()},
        "cost/macs": float(macs(model)),
        "cost/bytes": float(path.stat().st_size),
        "cost/latency_ms": latency_ms(model),
    }
    write_atomic(work.out / "cost.json", json.dumps(metrics, indent=1).encode())
    return "cost.json", metrics
