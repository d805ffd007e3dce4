"""Snapshots of a sparse stage that is stopped and goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from crnn.training import Run
from flows.stages.sparse import _snapshots


def folder_of(out: Path) -> Any:
    """As much of a stage as writes a network."""
    return SimpleNamespace(out=out, save_model=lambda path, model: path.write_text(model))


def after_step(epoch: int, dead: int, model: str) -> Run:
    deaths = torch.arange(100).flip(0).sub(99 - dead).clamp(min=0)
    return cast(Run, SimpleNamespace(epoch=epoch, model=model, memory={"deaths": deaths}))


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
