"""The fine-tune stage: with a teacher, with new BatchNorm statistics, or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnn.checkpoint import load_checkpoint
from flows import cache, definitions
from flows.cache import MODEL
from flows.experiment import load_experiment
from flows.stages.training import finetune
from tests.flows.conftest import Project, work_of

Finished = tuple[Project, dict[str, Any]]


def tuned(
    finished: Finished, folder: Path, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fine-tune the cut of 0.6 in this process: its state dict and its figures."""
    project, _ = finished
    manifests = project.manifests()
    named = ("data", "baseline", "prune 0.6")
    inputs = {label.split()[0]: m for label, m in manifests.items() if label in named}
    training = {"epochs": 1, "batch_size": 16, **settings}
    work = work_of(project, "finetune", inputs, folder, seed=0, train=training)
    result, metrics = finetune(work)
    return load_checkpoint(work.out / result).model.state_dict(), metrics


def cut_of(finished: Finished) -> dict[str, Tensor]:
    project, _ = finished
    key = project.manifests()["prune 0.6"]["key"]
    return load_checkpoint(project.home / "stages" / key / MODEL).model.state_dict()


def test_no_epoch_leaves_the_cut_as_it_is(finished: Finished, tmp_path: Path) -> None:
    tensors, metrics = tuned(finished, tmp_path, epochs=0)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in cut_of(finished).items())
    untuned = finished[0].manifests()["prune 0.6"]["metrics"]
    assert metrics["val/word_accuracy"] == untuned["val/word_accuracy"]


def test_recalibration_changes_the_statistics_alone(finished: Finished, tmp_path: Path) -> None:
    tensors, _ = tuned(finished, tmp_path, epochs=0, recalibrate=32)
    for name, tensor in cut_of(finished).items():
        statistic = "running" in name
        assert torch.equal(tensor, tensors[name]) != statistic or "tracked" in name, name


def test_the_baseline_teaches_where_it_is_asked_to(finished: Finished, tmp_path: Path) -> None:
    plain, metrics = tuned(finished, tmp_path / "plain")
    taught, with_teacher = tuned(finished, tmp_path / "taught", distill=1.0)
    assert with_teacher["train/loss"] > metrics["train/loss"]
    assert not torch.equal(plain["head.weight"], taught["head.weight"])


@pytest.mark.parametrize("distill", [0, 1])
def test_the_baseline_is_an_input_where_it_teaches(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, distill: int
) -> None:
    project = finished[0]
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    experiment = load_experiment(project.params, [f"finetune.distill={distill}"])
    made = project.manifests()
    upstream = {
        name: cache.verified(project.home / "stages" / made[label]["key"])
        for name, label in (("data", "data"), ("baseline", "baseline"), ("prune", "prune 0.6"))
    }
    stage = definitions.finetune_stage(experiment, upstream, 0.6, 0)
    assert ("baseline" in stage.inputs) == bool(distill)
