"""Snapshots of a sparse stage that is stopped and goes on, and what its index plans."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, save_checkpoint
from crnn.networks.branches import shortcuts_of
from crnn.networks.recogniser import Recogniser
from crnn.training import Run
from flows.stages.sparse import _snapshots, _write_index, free_ratio, highest_ratio, plan
from flows.stages.targets import ratio_for
from pruning.cost import parameters
from pruning.coupling import groups_of
from pruning.gammas import widths
from pruning.selection import ratio_of
from pruning.settings import PruneSettings, SparseSettings
from pruning.slimming import slim
from tests.conftest import random_recogniser
from tests.pruning.test_surgery import silence

DIGITS = Charset("0123456789")


def folder_of(out: Path) -> Any:
    """As much of a stage as writes a network."""
    return SimpleNamespace(out=out, save_model=lambda path, model: path.write_text(model))


def after_step(epoch: int, dead: int, model: str) -> Run:
    deaths = torch.arange(100).flip(0).sub(99 - dead).clamp(min=0)
    return cast(Run, SimpleNamespace(epoch=epoch, model=model, memory={"deaths": deaths}))


def index_without_a_branch(tmp_path: Path, drop_branches: bool) -> tuple[Path, Recogniser]:
    """Of a network in which the channels of one branch are dead, and the branch may go or not."""
    model = random_recogniser(width=1.0, backbone="mobilenetv3_small_100")
    groups = groups_of(model)
    first = next(group for group in groups if group.branch)
    silence(model, [torch.full((g.size,), g is not first) for g in groups])
    deaths = torch.cat([torch.arange(1, g.size + 1) * (g is first) for g in groups])
    run = cast(Run, SimpleNamespace(model=model, memory={"deaths": deaths}))
    save_checkpoint(tmp_path / "model.safetensors", Checkpoint(model, DIGITS, 160, "sparse"))
    (tmp_path / "snapshots").mkdir()
    work: Any = SimpleNamespace(
        out=tmp_path,
        write_json=lambda name, content: (tmp_path / name).write_text(json.dumps(content)),
    )
    _write_index(work, run, SparseSettings(epochs=1, drop_branches=drop_branches))
    return tmp_path / "snapshots.json", model


def test_a_dead_branch_is_planned_to_go_where_it_may(tmp_path: Path) -> None:
    index, model = index_without_a_branch(tmp_path, drop_branches=True)
    dead = next(group.size for group in groups_of(model) if group.branch)
    ratio = ratio_of(dead, sum(widths(model).values()))
    assert free_ratio(index, PruneSettings()) >= ratio
    uncut, masks = plan(index, ratio, PruneSettings())
    assert [int(mask.sum()) for mask in masks].count(0) == 1
    compact = slim(uncut.model, masks, PruneSettings())
    assert len(shortcuts_of(compact)) == 1
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert (compact(images) - model(images)).abs().max() < 1e-9
    _, achieved = ratio_for(index, "params", parameters(compact)["total"], PruneSettings())
    assert achieved == parameters(compact)["total"]


def test_a_dead_branch_that_shall_stay_keeps_a_channel(tmp_path: Path) -> None:
    index, _ = index_without_a_branch(tmp_path, drop_branches=False)
    for settings in (PruneSettings(), PruneSettings(selection="reference")):
        assert all(mask.any() for mask in plan(index, highest_ratio(index, settings), settings)[1])


def test_the_repeated_epoch_leaves_its_own_snapshots_alone(tmp_path: Path) -> None:
    killed = _snapshots(folder_of(tmp_path))
    for epoch, dead in ((0, 0), (0, 11), (1, 20), (1, 40)):
        killed(after_step(epoch, dead, "killed"))
    resumed = _snapshots(folder_of(tmp_path))
    for epoch, dead in ((1, 12), (1, 21), (1, 21), (2, 50)):
        resumed(after_step(epoch, dead, "resumed"))
    found = {path.stem: path.read_text() for path in (tmp_path / "snapshots").iterdir()}
    assert found == {
        "zeros-000000-epoch-0000": "killed",
        "zeros-000011-epoch-0000": "killed",
        "zeros-000012-epoch-0001": "resumed",
        "zeros-000021-epoch-0001": "resumed",
        "zeros-000050-epoch-0002": "resumed",
    }
