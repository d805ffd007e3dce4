"""The stages that train: baseline, fine-tune and, in sparse.py, sparse. Arguments alone differ."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crnn.checkpoint import load_checkpoint, load_run, save_run
from crnn.devices import best_device
from crnn.distributed import rank
from crnn.errors import CheckpointError
from crnn.evaluation import evaluate
from crnn.files import write_atomic
from crnn.networks.recogniser import Recogniser
from crnn.settings import BaselineSettings, ModelSettings, TrainSettings
from crnn.training import Penalty, Run, Teacher, fit, recalibrate, start
from flows.cache import GAMMAS, HISTORY, MODEL, STATE, history
from flows.stages.work import Outcome, Work, proven
from pruning.cost import COSTS, out_of_reach
from pruning.coupling import groups_of
from pruning.gammas import absolute_gammas, gamma_statistics, widths
from pruning.selection import keep_masks, largest_ratio
from pruning.settings import FinetuneSettings, PruneSettings, SparseSettings
from pruning.slimming import slim
from pruning.sparsity import FLOOR, largest_target
from pruning.surgery import refuse_uncuttable


def baseline(work: Work) -> Outcome:
    """Train the uncut network, from scratch or from a checkpoint."""
    if given := work.job["checkpoint"]:
        proven(Path(given), work.settings["checkpoint"])
    model = initial_model(work, given or work.settings["model"])
    if rank() == 0:  # The others may be on a busier machine, without the checkpoint.
        to_cut = work.job["to_cut"]
        cut = initial_model(work, to_cut) if to_cut else model
        look_ahead(work, cut)
    work.write_summary(model)
    settings = BaselineSettings.model_validate({**work.settings["train"], "checkpoint": given})
    teacher = teacher_of(work, settings.distill or 0)
    return MODEL, train(work, model, settings, teacher=teacher)[1]


def finetune(work: Work) -> Outcome:
    """Train the cut network on."""
    settings = FinetuneSettings.model_validate(work.settings["train"])
    model = load_checkpoint(work.input("prune")).model
    run, metrics = train(work, model, settings, teacher=teacher_of(work, settings.distill))
    if settings.recalibrate:
        recalibrate(run.model, work.lines("train").sample(settings.recalibrate))
        work.save_model(work.out / MODEL, run.model)
        metrics |= evaluate(run.model, work.lines("val"), work.unseen())
    return MODEL, metrics


def teacher_of(work: Work, weight: float) -> Teacher | None:
    """Who teaches a stage: the experiment's teacher, else its baseline, if either is an input."""
    names = [name for name in ("teacher", "baseline") if name in work.job["inputs"]]
    if not names or not weight:
        return None
    return Teacher(load_checkpoint(work.input(names[0])).model, weight)


def initial_model(work: Work, origin: str | dict[str, Any]) -> Recogniser:
    """The network of a checkpoint, or an uncut one of such settings, initialised from the seed.

    Args:
        work: Data, charset and seed.
        origin: Path of the checkpoint, or model settings.

    Raises:
        CheckpointError: The checkpoint is unusable or reads other characters than the data have.
    """
    charset = work.lines("train").charset
    if isinstance(origin, str):
        given = load_checkpoint(Path(origin))
        if given.charset != charset:
            raise CheckpointError(
                f"checkpoint {origin} reads other characters than the data have:"
                f" {_first_difference(given.charset.characters, charset.characters)}; set"
                " data.charset to the charset the checkpoint was trained with"
            )
        return given.model
    torch.manual_seed(work.settings["seed"])
    return Recogniser(ModelSettings.model_validate(origin), charset.classes)


def _first_difference(given: str, wanted: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b), None)
    if place is None:
        return f"{len(given)}, and the data {len(wanted)}"
    return f"its character {place + 1} is {given[place]!r}, that of the data {wanted[place]!r}"


def look_ahead(work: Work, model: Recogniser) -> None:
    """Before hours of training: say what the sparse stage and the cuts will not reach.

    Raises:
        SettingsError: A network that cannot be cut, or a cut, ratio, rank or target that cannot be.
    """
    refuse_uncuttable(model)
    _warn_beyond_auto(work, model)
    _refuse_impossible_cuts(work, model)


def _warn_beyond_auto(work: Work, model: Recogniser) -> None:
    """Say that `auto` will stay below sparse.target_ratio, if it will."""
    sparse = SparseSettings.model_validate(work.job["sparse"])
    reached = largest_target(model, sparse)
    if sparse.method == "auto" and sparse.target_ratio > reached:
        but = ", but for branches that may go" if sparse.drop_branches else ""
        message = (
            f"sparse.target_ratio {sparse.target_ratio:g} will not be reached, {reached:g} at most:"
            f" {FLOOR:.0%} of each layer's channels stay, and one at least{but}"
        )
        work.emit({"event": "notice", "message": message})
    if sparse.drop_branches and not any(group.branch for group in groups_of(model)):
        message = f"sparse.drop_branches does nothing: {model.settings.backbone} has none to drop"
        work.emit({"event": "notice", "message": message})


def _refuse_impossible_cuts(work: Work, model: Recogniser) -> None:
    """Try the deepest cut, and the targets, on the network as it is.

    Branches that may go count with their floors: whether they die is not known before.

    Raises:
        SettingsError: A cut, ratio or rank that cannot be, or a target out of reach.
    """
    settings = PruneSettings.model_validate(work.job["prune"])
    gammas = absolute_gammas(model)
    slim(model, keep_masks(gammas, max(work.job["ratios"], default=0), settings), settings)
    if wishes := settings.targets.wishes():
        highest = largest_ratio(gammas, settings)
        narrow = slim(model, keep_masks(gammas, highest, settings), settings)
        network = work.checkpoint(narrow, "finetune")
        for kind, value in wishes.items():
            if (cost := COSTS[kind](network)) > value:
                raise out_of_reach(kind, value, cost, highest)


def train(
    work: Work,
    model: Recogniser,
    settings: TrainSettings,
    penalty: Penalty | None = None,
    look: Callable[[Run], None] | None = None,
    teacher: Teacher | None = None,
) -> tuple[Run, dict[str, float]]:
    """Train from the last finished epoch of this stage, or from its beginning; look each step.

    After each epoch its record is written before its state, and a resumed run drops records past
    the state: no epoch is recorded twice, none is missing.

    Returns:
        The finished run, whose network is saved, and the figures of its last epoch.
    """
    lines, val, unseen = work.lines("train"), work.lines("val"), work.unseen()
    run = _run(work, model.to(best_device()), settings)
    if teacher:
        teacher.model.to(best_device()).to(memory_format=torch.channels_last)
        run.teacher = teacher
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
            look(run)
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
    return run, {name: value for name, value in final.items() if name != "epoch"}


def _run(work: Work, model: Recogniser, settings: TrainSettings) -> Run:
    state = work.folder / STATE
    if state.exists():
        try:
            return load_run(state, model, settings)
        except CheckpointError as error:
            if rank():
                raise  # It read a copy; the first process says so of the state itself.
            raise work.anew(str(error)) from error
    return start(model, settings, work.seed)


def _save_gammas(out: Path, model: Recogniser, epoch: int) -> None:
    """Raw |gamma| of every group after an epoch."""
    arrays: dict[str, Any] = {
        name: gamma.float().cpu().numpy()
        for name, gamma in zip(widths(model), absolute_gammas(model), strict=True)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(out / GAMMAS / f"epoch-{epoch:04d}.npz", buffer.getvalue())
