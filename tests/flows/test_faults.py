"""Faults from outside while a pipeline runs. `make torture` tries many more, at random moments."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from crnn.errors import PassingError
from crnn.files import sha256, write_atomic
from flows.cache import HISTORY, STATE, Stage
from flows.cli import _explain
from flows.definitions import checkpoint_of
from flows.experiment import Experiment
from flows.stages.work import proven
from tests.flows.commands import PATIENCE
from tests.flows.conftest import TINY, Project, copy_of, new_project, wait_until

Finished = tuple[Project, dict[str, Any]]


def test_a_file_that_changed_since_it_was_found_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"other bytes")
    with pytest.raises(PassingError, match="was changed or removed while the pipeline"):
        proven(path, "0" * 64)


def test_a_checkpoint_that_changes_before_its_stage_starts_is_not_another_network(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"these weights")
    given = {"baseline": {"checkpoint": str(own), "epochs": 0}}
    experiment = Experiment.model_validate({**TINY, **given})
    stage = Stage("baseline", "baseline", {"checkpoint": sha256(own)}, {}, 1)
    assert checkpoint_of(experiment, stage) == str(own)
    own.write_bytes(b"other weights")
    with pytest.raises(PassingError, match=r"own\.safetensors was changed while the pipeline ran"):
        checkpoint_of(experiment, stage)


def test_threads_that_write_one_file_do_not_take_it_from_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: write_atomic(tmp_path / "memo", b"1"), range(400)))
    assert [path.name for path in tmp_path.iterdir()] == ["memo"]


def test_samples_that_change_while_a_stage_reads_them_do_not_pass_for_the_old_ones(
    label_folder: Path, tmp_path: Path
) -> None:
    data = {"root": str(label_folder), "train": "train.txt", "val": "val.txt", "max_width": 160}
    project = new_project(tmp_path / "project", data=data, ratios=[0.6])
    command = project.command("frontier", str(project.params))
    with subprocess.Popen(command, stderr=subprocess.PIPE, **project.options()) as running:
        wait_until(lambda: list(project.home.glob("work/baseline-*")), running)
        labels = label_folder / "train.txt"
        changed = tmp_path / "train.txt"
        changed.write_text(labels.read_text().replace("\t", "\t0"))
        changed.replace(labels)
        said = running.communicate()[1].splitlines()[-1]
    assert running.returncode == 2
    assert "the samples changed while baseline was computed; set aside as" in said
    assert set(project.manifests()) == {"data"}
    assert list((project.home / "set-aside").glob("baseline-*/out/model.safetensors"))
    assert project.frontier()["computed"][:2] == ["data", "baseline"]


def test_few_open_files_are_enough_or_said(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    command = project.command("frontier", str(project.params), "--ratios", "0.5")
    limited = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", *command]
    run = subprocess.run(limited, capture_output=True, **project.options())
    assert "Traceback" not in run.stderr
    if run.returncode:
        assert run.returncode == 2
        assert "Too many open files" in run.stderr.splitlines()[-1]
    rows = project.frontier("--ratios", "0.5")["rows"]
    assert [row["point"] for row in rows] == ["baseline", "0.5"]


def test_no_permission_is_said_and_nothing_is_lost(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    stages = project.home / "stages"
    before = {path.name for path in stages.iterdir()}
    shutil.rmtree(project.home / "work")
    (project.home / "work").write_text("a file where a folder is needed")
    failed = project.run("frontier", str(project.params), "--ratios", "0.5", code=2)
    assert str(project.home / "work") in failed.stderr.splitlines()[-1]
    assert {path.name for path in stages.iterdir()} == before


@pytest.mark.parametrize("name", [STATE, f"out/{HISTORY}"])
def test_a_resume_state_that_cannot_be_used_is_set_aside(
    finished: Finished, tmp_path: Path, name: str
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    key = project.manifests()["finetune 0.6"]["key"]
    shutil.rmtree(project.home / "stages" / key)
    work = project.home / "work" / key
    (work / "out").mkdir(parents=True)
    (work / name).write_bytes(b"damaged")
    failed = project.run("frontier", str(project.params), code=2)
    assert "run again to start this stage anew" in failed.stderr.splitlines()[-1]
    assert list((project.home / "set-aside").glob(f"{key}-*/{name}"))
    assert project.frontier()["computed"] == ["finetune 0.6"]


def test_a_disk_too_full_for_prefect_s_server_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m") as small:
        project = new_project(small / "project", fresh=True)
        environment = project.options()["env"]
        del environment["PREFECT_API_URL"]
        command = project.command("frontier", str(project.params))
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    assert run.returncode == 2
    assert "Prefect's server does not start" in run.stderr.splitlines()[-1]


def test_an_error_of_prefect_s_server_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    request = httpx.Request("POST", "http://127.0.0.1:4200/api/flow_runs")
    answer = httpx.Response(500, request=request)
    error = httpx.HTTPStatusError("Server error '500'", request=request, response=answer)
    with pytest.raises(SystemExit, match="2"):
        _explain(PrefectHTTPStatusError.from_httpx_error(error))
    assert "Prefect's server at http://127.0.0.1:4200/api fails (" in capsys.readouterr().err


def test_a_prefect_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    project.environment = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    failed = project.run("frontier", str(project.params), code=2)
    assert "Prefect's server at http://127.0.0.1:9/api fails (" in failed.stderr.splitlines()[-1]


def test_a_state_folder_that_sqlite_cannot_name_is_one_sentence(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    project.environment = {"CRNN_SLIM_HOME": str(tmp_path / "what?")}
    failed = project.run("frontier", str(project.params), code=2)
    assert "has a '?'" in failed.stderr.splitlines()[-1]


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "3m") as small:
        changes = {
            "model": {"width": 0.4, "hidden": 8},
            "ratios": [0.6],
            "execution": {"retries": 1, "retry_seconds": 0.1},
        }
        project = new_project(small / "project", fresh=True, **changes)
        project.environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
        failed = project.run("frontier", str(project.params), code=2)
        last = failed.stderr.strip().splitlines()[-1]
        assert "No space left on device" in last
        assert "tried again in 0.1 s" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert "data" in project.manifests()
        subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True)
        assert "data" not in project.frontier()["computed"]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at the folder, of so many bytes (or `3m`)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
