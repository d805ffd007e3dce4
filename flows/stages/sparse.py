"""The sparse stage: training under a penalty, snapshots on the way, and whether it is ready to cut.

With `auto` channels die one after another and stay dead. A network with 87% of them dead is no
start for a cut of 62%, so the way there is kept: a snapshot each time the share of zeros passes a
multiple of SNAPSHOT_STEP. A cut starts from the first snapshot in which all that it removes is
dead. With the other methods channels come back, and only the last epoch counts.
"""

import copy
import json
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crnn.checkpoint import Checkpoint, load_checkpoint
from crnn.devices import best_device
from crnn.distributed import rank
from crnn.evaluation import evaluate
from crnn.files import sha256, write_atomic
from crnn.networks.recogniser import Recogniser
from crnn.training import Run
from flows.cache import MODEL, READINESS, SNAPSHOTS, history
from flows.report import readiness_picture
from flows.rows import ACCURACY
from flows.stages.training import initial_model, look_ahead, teacher_of, train
from flows.stages.work import Outcome, Work, proven
from pruning.coupling import groups_of
from pruning.gammas import absolute_gammas, widths
from pruning.readiness import Readiness, live_removed, readiness
from pruning.selection import keep_masks, largest_ratio
from pruning.settings import PruneSettings, SparseSettings
from pruning.sparsity import penalty_of

INDEX = "snapshots.json"
SNAPSHOT_STEP = 0.02
"""Share of zeros between two snapshots of a sparse stage."""


def sparse(work: Work) -> Outcome:
    """Train with a penalty on the BatchNorm scales, and say how far the result can be cut.

    Returns:
        The index of the snapshots and the last epoch, which plan reads, and the figures.
    """
    settings = SparseSettings.model_validate(work.settings["train"])
    given = load_checkpoint(work.input("baseline")).model if settings.from_baseline else None
    model = copy.deepcopy(given) if given else initial_model(work, work.settings["model"])
    if rank() == 0:
        look_ahead(work, model)
    look = _snapshots(work) if settings.method == "auto" and rank() == 0 else None
    teacher = teacher_of(work, settings.distill)
    run, metrics = train(work, model, settings, penalty_of(settings), look, teacher)
    _write_index(work, run, settings)
    verdict = readiness(run.model, settings, metrics[ACCURACY], _accuracy(work, given))
    _write_readiness(work, verdict)
    figures = {"readiness/free_ratio": verdict.free_ratio}
    return INDEX, {**metrics, **figures}


def plan(index: Path, ratio: float, settings: PruneSettings) -> tuple[Checkpoint, list[Tensor]]:
    """The network to cut at a ratio, and the keep mask of each layer.

    It is the first in which all that goes is dead; where more has to go than died, the last. Among
    the cuts of an auto sparse stage that of a higher ratio keeps a subset.

    Args:
        index: Result file of the sparse stage.
        ratio: Prune ratio.
        settings: Selection rule, floors, rounding.

    Raises:
        UserError: The ratio is beyond what the floors allow.
    """
    networks, deaths, vanishing = _read_index(index)
    alive = [(order == 0).float() for order in deaths]
    masks = keep_masks(alive, ratio, settings, deaths, vanishing)
    gone = torch.cat(deaths)[~torch.cat(masks)]
    for network in networks:
        if ((gone > 0) & (gone <= network["zeros"])).all():
            return _network(index, network), masks
    last = _network(index, networks[-1])
    return last, keep_masks(absolute_gammas(last.model), ratio, settings, deaths, vanishing)


def highest_ratio(index: Path, settings: PruneSettings) -> float:
    """Largest ratio of four decimals that can be cut at all.

    Args:
        index: Result file of the sparse stage.
        settings: Selection rule, floors, rounding.
    """
    _, deaths, vanishing = _read_index(index)
    return largest_ratio(deaths, settings, vanishing)


def free_ratio(index: Path, settings: PruneSettings) -> float:
    """Largest ratio of four decimals whose cut, with its floors and rounding, is free.

    Args:
        index: Result file of the sparse stage.
        settings: Selection rule, floors, rounding.
    """
    networks, deaths, vanishing = _read_index(index)
    gammas = absolute_gammas(_network(index, networks[-1]).model)

    def takes_live(basis_points: int) -> bool:
        masks = keep_masks(gammas, basis_points / 10_000, settings, deaths, vanishing)
        return live_removed(gammas, masks) > 0

    points = range(round(10_000 * highest_ratio(index, settings)) + 1)
    return max(0, bisect_left(points, True, key=takes_live) - 1) / 10_000


def _read_index(index: Path) -> tuple[list[dict[str, Any]], list[Tensor], list[bool]]:
    """The networks that were kept, in which order a group's channels died, which may vanish."""
    content = json.loads(index.read_text(encoding="utf-8"))
    deaths = [torch.tensor(layer) for layer in content["deaths"]]
    branches = content.get("branches", [])
    vanishing = [i in branches and bool((order > 0).all()) for i, order in enumerate(deaths)]
    return content["networks"], deaths, vanishing


def _network(index: Path, entry: dict[str, Any]) -> Checkpoint:
    return load_checkpoint(proven(index.parent / entry["file"], entry["sha256"]))


def _accuracy(work: Work, model: Recogniser | None) -> float | None:
    """Val word accuracy of the network that the stage started from; None where it had none."""
    if model is None:
        return None
    return evaluate(model.to(best_device()), work.lines("val"), set())[ACCURACY]


def _write_readiness(work: Work, verdict: Readiness) -> None:
    work.write_json(READINESS, vars(verdict))
    epochs = [(100 * r["gamma/share_zero"], 100 * r[ACCURACY]) for r in history(work.out)]
    write_atomic(work.out / "readiness.png", readiness_picture(verdict, epochs))


def _snapshots(work: Work) -> Callable[[Run], None]:
    """A function that saves the network where its zeros have reached the next step.

    Those of the epoch that a resumed stage repeats are taken anew: on a GPU, or on another number
    of processes, other channels may die in it.
    """
    (work.out / SNAPSHOTS).mkdir(exist_ok=True)
    taken: int | None = None

    def save_where_due(run: Run) -> None:
        nonlocal taken
        if taken is None:
            taken = _taken_before(work, run.epoch)
        zeros, channels = int((run.memory["deaths"] > 0).sum()), len(run.memory["deaths"])
        step = SNAPSHOT_STEP * channels
        if taken < 0 or zeros // step > taken // step:
            name = f"zeros-{zeros:06d}-epoch-{run.epoch:04d}.safetensors"
            work.save_model(work.out / SNAPSHOTS / name, run.model)
            taken = zeros

    return save_where_due


def _taken_before(work: Work, epoch: int) -> int:
    """Most zeros of a snapshot from before an epoch, -1 without one; later ones are removed."""
    for path in _snapshot_files(work):
        if int(path.stem.rpartition("-")[2]) >= epoch:
            path.unlink()
    return max((_zeros(path) for path in _snapshot_files(work)), default=-1)


def _snapshot_files(work: Work) -> list[Path]:
    return sorted((work.out / SNAPSHOTS).glob("zeros-*.safetensors"))


def _zeros(snapshot: Path) -> int:
    """Number of dead channels of a snapshot."""
    return int(snapshot.stem.split("-")[1])


def _write_index(work: Work, run: Run, settings: SparseSettings) -> None:
    """List snapshots and last epoch by their zeros, ascending; their digests enter later keys."""
    sizes = list(widths(run.model).values())
    nobody = torch.zeros(sum(sizes), dtype=torch.long)
    deaths = run.memory.get("deaths", nobody).cpu()
    networks = [(_zeros(path), path) for path in _snapshot_files(work)]
    networks.append((int((deaths > 0).sum()), work.out / MODEL))
    content: dict[str, Any] = {
        "deaths": [layer.tolist() for layer in torch.split(deaths, sizes)],
        "networks": [
            {"zeros": zeros, "file": str(path.relative_to(work.out)), "sha256": sha256(path)}
            for zeros, path in networks
        ],
    }
    if settings.drop_branches:
        groups = enumerate(groups_of(run.model))
        content["branches"] = [number for number, group in groups if group.branch]
    work.write_json(INDEX, content)
