"""What is read again when data has changed, and what is not."""

from pathlib import Path

import pytest

from crnn.errors import StoppedError
from flows import definitions
from flows.experiment import load_experiment
from tests.crnn.test_sources import write_lmdb
from tests.flows.conftest import TINY, new_project


def test_of_a_set_in_shards_what_has_changed_is_read_alone(
    label_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b"):
        write_lmdb(tmp_path / "root" / "shards" / name, label_folder)
    data = {"root": str(tmp_path / "root"), "train": "shards", "val": 8}
    project = new_project(tmp_path / "project", data=data)
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    experiment = load_experiment(project.params)

    def read() -> tuple[str, int]:
        found = definitions.fingerprint(experiment)
        return found, capsys.readouterr().err.count("samples that are new or have changed")

    before, parts = read()
    assert parts == 3, "two shards, and the rendered lines"
    assert read() == (before, 0)
    other = write_lmdb(tmp_path / "other", label_folder, count=7)
    (other / "data.mdb").rename(tmp_path / "root" / "shards" / "b" / "data.mdb")
    after, parts = read()
    assert parts == 1
    assert after != before
    write_lmdb(tmp_path / "root" / "shards" / "c", label_folder)
    assert read()[1] == 1


@pytest.mark.parametrize("train", ["lines", "train.txt"])
def test_the_first_look_at_the_samples_can_be_stopped(
    train: str, label_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lmdb(label_folder / "lines", label_folder)
    data = {"root": str(label_folder), "train": train, "val": 8}
    project = new_project(tmp_path / "project", data=data)
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    with pytest.raises(StoppedError, match="stopped while the data was read"):
        definitions.data_stage(load_experiment(project.params), lambda: True)


def test_lmdbs_train_as_the_label_files_they_were_made_from(
    label_folder: Path, tmp_path: Path
) -> None:
    data = {**TINY["data"], "root": str(label_folder)}
    for split in ("train", "val"):
        write_lmdb(label_folder / split / "shard", label_folder, split=split)
    places = {"file": ("train.txt", "val.txt"), "shards": ("train", "val/shard")}
    trained = []
    for name, (train, val) in places.items():
        split = {**data, "train": train, "val": val}
        changes = {"ratios": [0.6], "execution": {"loader_workers": 1}}
        project = new_project(tmp_path / name, data=split, **changes)
        project.frontier()
        files = [project.manifests()[label]["files"] for label in ("sparse", "finetune 0.6")]
        trained.append([of["model.safetensors"]["sha256"] for of in files])
    assert trained[0] == trained[1]
