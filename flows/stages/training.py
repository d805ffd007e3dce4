"""The stages that train: baseline, sparse, fine-tune. They differ by arguments alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crnn.checkpoint import load_checkpoint, load_run, save_run
from crnn.devices import best_device
from crnn.errors import CheckpointError
from crnn.evaluation import evaluate
from crnn.files import sha256, write_atomic
from crnn.networks.recogniser import Recogniser
from crnn.settings import BaselineSettings, ModelSettings, TrainSettings
from crnn.training import Penalty, Run, fit, start
from flows import project
from flows.cache import GAMMAS, HISTORY, MODEL, SNAPSHOTS
from flows.stages.work import Outcome, Work, proven
from pruning.gammas import absolute_gammas, gamma_statistics, prunable, share_zero
from pruning.settings import PruneSettings, SparseSettings
from pruning.slimming import slim
from pruning.sparsity import penalty_of

STATE = "state.safetensors"
SNAPSHOT_INDEX = "snapshots.json"
SNAPSHOT_STEP = 500
"""Basis points of zeros between two snapshots of a sparse stage."""


def baseline(work: Work) -> Outcome:
    """Train the uncut network, from scratch or from a checkpoint."""
    model = _given_model(work) if "checkpoint" in work.settings else _fresh_model(work)
    _refuse_impossible_cuts(work, model)
    work.write_summary(model)
    settings = {**work.settings["train"], "checkpoint": work.job["checkpoint"]}
    return MODEL, _train(work, model, BaselineSettings.model_validate(settings))


def sparse(work: Work) -> Outcome:
    """Train with a penalty on the BatchNorm scales.

    The last epoch serves the highest ratio. With `auto`, a network with that many dead channels
    is no start for a lower one, so the way there is kept: a snapshot each time the share of zeros
    passes a multiple of SNAPSHOT_STEP. The other methods let channels come back, and only their
    last epoch counts.

    Returns:
        The index of the snapshots and the last epoch, which start_of_cut reads, and the figures.
    """
    settings = SparseSettings.model_validate(work.settings["train"])
    if settings.from_baseline:
        model = load_checkpoint(work.input("baseline")).model
    else:
        model = _fresh_model(work)
    _refuse_impossible_cuts(work, model)
    look = _snapshots(work) if settings.method == "auto" else None
    metrics = _train(work, model, settings, penalty_of(settings), look)
    _write_index(work, share_zero(model))
    return SNAPSHOT_INDEX, metrics


def finetune(work: Work) -> Outcome:
    """Train the cut network on."""
    model = load_checkpoint(work.input("prune")).model
    return MODEL, _train(work, model, TrainSettings.model_validate(work.settings["train"]))


def start_of_cut(index: Path, ratio: float) -> Path:
    """The network of a sparse stage to cut at a ratio: the sparsest with no zero to spare.

    Args:
        index: Result file of the stage.
        ratio: Prune ratio.
    """
    entries = json.loads(index.read_text(encoding="utf-8"))
    fitting = [entry for entry in entries if entry["zeros"] <= round(10_000 * ratio)]
    chosen = fitting[-1] if fitting else entries[0]
    return proven(index.parent / str(chosen["file"]), chosen["sha256"])


def _fresh_model(work: Work) -> Recogniser:
    torch.manual_seed(work.settings["seed"])
    settings = ModelSettings.model_validate(work.settings["model"])
    return Recogniser(settings, work.lines("train").charset.classes)


def _given_model(work: Work) -> Recogniser:
    path = Path(work.job["checkpoint"])
    given, charset = load_checkpoint(path), work.lines("train").charset
    if given.charset != charset:
        raise CheckpointError(
            f"checkpoint {path} reads {len(given.charset.characters)} characters, the data has"
            f" {len(charset.characters)}, and they are not the same; set data.charset to the"
            " charset the checkpoint was trained with"
        )
    return given.model


def _refuse_impossible_cuts(work: Work, model: Recogniser) -> None:
    """Before hours of training: try the deepest cut on the network as it is."""
    settings = PruneSettings.model_validate(work.job["prune"])
    slim(model, max(work.job["ratios"], default=0), settings)


def _train(
    work: Work,
    model: Recogniser,
    settings: TrainSettings,
    penalty: Penalty | None = None,
    look: Callable[[Recogniser], None] | None = None,
) -> dict[str, float]:
    """Train from the last finished epoch of this stage, or from its beginning; look each step.

    After each epoch its record is written before its state, and a resumed run drops records past
    the state: no epoch is recorded twice, none is missing.
    """
    lines, val, unseen = work.lines("train"), work.lines("val"), work.unseen()
    run = _run(work, model.to(best_device()), settings)
    records = history(work.out)[: run.epoch]

    def scores() -> dict[str, float]:
        return {**evaluate(run.model, val, unseen), **gamma_statistics(run.model)}

    def after_epoch(metrics: dict[str, float]) -> None:
        records.append({"epoch": run.epoch, **metrics, **scores()})
        _save_gammas(work.out, run.model, run.epoch)
        lines_of = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(work.out / HISTORY, lines_of.encode())
        save_run(work.folder / STATE, run)
        work.emit({"event": "epoch", "epochs": settings.epochs, **records[-1]})

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
    work.save_model(work.out / MODEL, run.model)
    final = records[-1] if records else scores()
    return {name: value for name, value in final.items() if name != "epoch"}


def _run(work: Work, model: Recogniser, settings: TrainSettings) -> Run:
    state = work.folder / STATE
    if state.exists():
        try:
            return load_run(state, model, settings)
        except CheckpointError as error:
            target = project.set_aside_folder() / f"{work.folder.name}-{time.time_ns()}"
            target.parent.mkdir(parents=True, exist_ok=True)
            work.folder.rename(target)
            raise CheckpointError(
                f"{error}; set aside as {target}, run again to start this stage anew"
            ) from error
    return start(model, settings, work.settings["seed"])


def history(out: Path) -> list[dict[str, float]]:
    """Records of the finished epochs of a training."""
    if not (out / HISTORY).exists():
        return []
    return [json.loads(line) for line in (out / HISTORY).read_text(encoding="utf-8").splitlines()]


def _save_gammas(out: Path, model: Recogniser, epoch: int) -> None:
    """Raw |gamma| of every layer after an epoch."""
    arrays: dict[str, Any] = {
        name: gamma.float().cpu().numpy()
        for name, gamma in zip(prunable(model), absolute_gammas(model), strict=True)
    }
    (out / GAMMAS).mkdir(exist_ok=True)
    np.savez(out / GAMMAS / f"epoch-{epoch:04d}.npz", **arrays)


def _snapshots(work: Work) -> Callable[[Recogniser], None]:
    """A function that saves the network where its zeros have reached the next step.

    A resumed stage finds the snapshots of the epoch it repeats, which would be the same bits.
    """
    (work.out / SNAPSHOTS).mkdir(exist_ok=True)
    taken = max((_zeros(path) for path in _snapshot_files(work)), default=-1)

    def save_where_due(model: Recogniser) -> None:
        nonlocal taken
        zeros = int(10_000 * share_zero(model))
        if taken < 0 or zeros // SNAPSHOT_STEP > taken // SNAPSHOT_STEP:
            work.save_model(work.out / SNAPSHOTS / f"zeros-{zeros:04d}.safetensors", model)
            taken = zeros

    return save_where_due


def _snapshot_files(work: Work) -> list[Path]:
    return sorted((work.out / SNAPSHOTS).glob("zeros-*.safetensors"))


def _zeros(snapshot: Path) -> int:
    """Basis points of zeros of a snapshot."""
    return int(snapshot.stem.removeprefix("zeros-"))


def _write_index(work: Work, last: float) -> None:
    """List snapshots and last epoch by their zeros, ascending; their digests enter later keys."""
    networks = [(_zeros(path), path) for path in _snapshot_files(work)]
    networks = [*networks, (int(10_000 * last), work.out / MODEL)]
    entries = [
        {"zeros": zeros, "file": str(path.relative_to(work.out)), "sha256": sha256(path)}
        for zeros, path in sorted(networks, key=lambda network: network[0])
    ]
    work.write_json(SNAPSHOT_INDEX, entries)
