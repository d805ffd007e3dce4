"""A network of timm with a teacher of another kind, through all stages."""

import json
from pathlib import Path

import pytest

from crnn.checkpoint import load_checkpoint
from crnn.errors import SettingsError
from crnn.networks.branches import shortcuts_of
from flows.cache import WIDTHS
from flows.definitions import open_sources
from flows.experiment import load_experiment
from tests.flows.conftest import new_project

TAUGHT = {
    "ratios": [0.5, 0.95],
    "model": {"backbone": "mobilenetv3_small_100", "hidden": 8},
    "teacher": {"model": {"width": 0.1, "hidden": 8}, "epochs": 2, "batch_size": 16},
    "baseline": {"epochs": 1, "batch_size": 16, "distill": 1.0},
    "sparse": {"epochs": 2, "batch_size": 8, "target_ratio": 0.95, "drop_branches": True},
    "finetune": {"epochs": 1, "batch_size": 16, "distill": 1.0},
}


def test_what_cannot_be_cut_is_refused_before_its_teacher_is_trained(tmp_path: Path) -> None:
    project = new_project(tmp_path, **{**TAUGHT, "ratios": [0.5]}, prune={"min_ratio": 0.9})
    refused = project.run("frontier", str(project.params), code=2)
    assert "prune ratio 0.5 would remove" in refused.stderr
    assert set(project.manifests()) == {"data"}


def test_a_student_of_timm_is_taught_cut_and_compared(tmp_path: Path) -> None:
    project = new_project(tmp_path, **TAUGHT)
    result = project.frontier()
    manifests = project.manifests()
    key = manifests["teacher"]["key"]
    for label in ("baseline", "sparse", "finetune 0.5"):
        assert manifests[label]["inputs"]["teacher"] == key, label
    assert "teacher" not in manifests["prune 0.5"]["inputs"]
    uncut, slim, shallow = result["rows"]
    assert uncut["stages"]["teacher"] == key
    assert slim["prune/live_channels_removed"] == 0
    assert slim["prune/word_accuracy_before"] == slim["prune/word_accuracy_untuned"]
    model = load_checkpoint(project.home / slim["checkpoint"]).model
    assert model.settings.backbone == "mobilenetv3_small_100"
    gone = shortcuts_of(load_checkpoint(project.home / shallow["checkpoint"]).model)
    kept = json.loads((project.home / "stages" / shallow["stages"]["prune"] / WIDTHS).read_text())
    assert len(gone) == list(kept.values()).count(0) > 0
    assert any(layer.constant.any() for layer in gone)
    teacher = load_checkpoint(project.home / "stages" / key / "model.safetensors").model
    assert teacher.settings.backbone == "vgg13"


@pytest.mark.parametrize("name", ["eca_resnet33ts", "selecsls42"])
def test_layers_with_strides_over_something_else_are_left_alone(tmp_path: Path, name: str) -> None:
    """The one has convolutions over channels, the other blocks that take a list of images."""
    project = new_project(tmp_path, model={"hidden": 8, "backbone": name})
    assert open_sources(load_experiment(project.params))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("model.backbone=mobilenetv3_smal", "did you mean mobilenetv3_small_100"),
        ("model.backbone=convnext_atto", "it has no BatchNorm"),
        ("model.backbone=mobilevit_xxs", "it has attention between positions"),
        ("model.backbone=convmixer_768_32", r"becomes \(768, 4, 9\), and \(channels, 1, 16\)"),
        ("model.backbone=regnetx_002", "grouped convolutions that are not depthwise"),
        ("model.backbone=resnet18s", "timm; resnet18s is none"),
        ("teacher={epochs: 1, distill: 1}", "a teacher is not"),
        ("baseline.distill=1", "needs a teacher section"),
    ],
)
def test_what_cannot_serve_is_one_sentence(tmp_path: Path, setting: str, reason: str) -> None:
    project = new_project(tmp_path, model={"hidden": 8})
    with pytest.raises(SettingsError, match=reason) as refusal:
        open_sources(load_experiment(project.params, [setting]))
    assert len(str(refusal.value).splitlines()) == 1
