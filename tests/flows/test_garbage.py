"""`crnn-slim gc`: what goes, what stays."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.garbage import garbage, remove
from flows.locks import is_free, single_flight
from tests.flows.conftest import Project, client_of, copy_of, runs_of

Finished = tuple[Project, dict[str, Any]]

PRUNE, SPARSE = f"prune-{'1' * 20}", f"sparse-{'2' * 20}"
WEEK = 7 * 86_400


def stages(project: Project) -> set[str]:
    return {path.name for path in (project.home / "stages").iterdir()}


def old_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "file").write_text("x")
    old = time.time() - WEEK - 1
    os.utime(path / "file", (old, old))
    os.utime(path, (old, old))


def test_what_a_sweep_refers_to_stays_until_its_run_is_deleted(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    before = stages(project)
    other = project.frontier("--ratios", "0.45")
    only_its_own = stages(project) - before
    assert len(only_its_own) == 4
    assert "\n0 folders" in "\n" + project.run("gc", "--older-than", "0", "--yes").stdout
    assert stages(project) == before | only_its_own

    client = client_of(project)
    client.delete_run(other["sweep_run"])
    tuned = runs_of(project, "stage")["finetune 0.45"].info.run_id
    client.create_registered_model("kept")
    version = client.create_model_version("kept", "runs:/it", run_id=tuned)
    shown = project.run("gc", "--older-than", "0").stdout
    kinds = {key.split("-")[0] for key in only_its_own if key in shown}
    assert kinds == {"measure", "latency"}
    client.delete_model_version("kept", version.version)
    assert "\n0 folders" in "\n" + project.run("gc", "--yes").stdout, "it is not a week old"
    shown = project.run("gc", "--older-than", "0").stdout
    assert "nothing was removed" in shown
    assert {key for key in before | only_its_own if key in shown} == only_its_own
    assert stages(project) == before | only_its_own
    assert "5 folders" in project.run("gc", "--older-than", "0", "--yes").stdout
    assert stages(project) == before
    assert project.frontier()["computed"] == []


def test_a_sweep_that_was_deleted_and_recorded_again_stays(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    before = stages(project)
    client = client_of(project)
    client.delete_run(finished[1]["sweep_run"])
    again = project.frontier()
    assert again["computed"] == []
    assert again["sweep_run"] != finished[1]["sweep_run"]
    assert "\n0 folders" in "\n" + project.run("gc", "--older-than", "0", "--yes").stdout
    assert stages(project) == before


def test_a_registered_model_whose_run_was_purged_is_no_outage(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    client = client_of(project)
    client.create_registered_model("kept")
    tuned = runs_of(project, "stage")["finetune 0.6"].info.run_id
    client.create_model_version("kept", "runs:/it", run_id=tuned)
    client.delete_run(tuned)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.database}"}
    purge = [sys.executable, "-m", "mlflow", "gc", "--run-ids", tuned]
    environment = {**os.environ, **store}
    subprocess.run(purge, env=environment, check=True, capture_output=True)
    assert "\n0 folders" in "\n" + project.run("gc", "--older-than", "0").stdout


def test_what_a_running_stage_starts_from_stays(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    client_of(project).delete_run(finished[1]["sweep_run"])
    sparse = project.manifests()["sparse"]
    work = project.home / "work" / PRUNE
    work.mkdir(parents=True)
    inputs = {"sparse": {"file": str(project.home / "stages" / sparse["key"] / "index.json")}}
    (work / "job.json").write_text(json.dumps({"inputs": inputs}))
    lock = project.home / "locks" / f"{PRUNE}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        shown = project.run("gc", "--older-than", "0").stdout
    assert "finetune" in shown
    for kept in (f"{PRUNE}:", sparse["key"], *sparse["inputs"].values()):
        assert kept not in shown
    assert sparse["key"] in project.run("gc", "--older-than", "0").stdout


def test_what_a_running_pipeline_has_used_stays(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    old_folder(project.home / "work" / SPARSE)
    lock = project.home / "locks" / "flow-1.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.utime(lock, (time.time() - 600, time.time() - 600))
        client_of(project).delete_run(project.frontier()["sweep_run"])
        shown = project.run("gc", "--older-than", "0").stdout
    baseline = project.manifests()["baseline"]["key"]
    assert SPARSE in shown
    assert baseline not in shown
    assert "1 folders" in shown
    assert baseline in project.run("gc", "--older-than", "0").stdout


def test_what_a_pipeline_has_used_that_ends_in_this_instant_stays(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have written its report after the reports were looked at."""
    project = copy_of(finished, tmp_path / "copy")
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    lock = project.home / "locks" / "flow-1.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.utime(lock, (time.time() - 600, time.time() - 600))
        project.frontier()  # It has used all stages.
        reports = project.home / "reports"

        def ended(path: Path) -> set[str]:
            fcntl.flock(held, fcntl.LOCK_UN)
            return set()

        monkeypatch.setattr("flows.garbage._stages_of", ended)
        assert list(reports.glob("*/sweep-*"))
        assert garbage(0, set(), set()) == []


def test_what_is_used_while_others_are_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRNN_SLIM_HOME", str(tmp_path))
    idle, resumed, held = (tmp_path / "work" / f"sparse-{n * 20}" for n in "123")
    for folder in (idle, resumed, held):
        old_folder(folder)
    found = garbage(7, set(), set())
    assert {item.path for item in found} == {idle, resumed, held}
    (resumed / "epoch").write_text("x")
    with single_flight(held.name):
        assert [item.path for item in remove(found, 7)] == [idle]
    assert not idle.exists()
    assert resumed.is_dir()
    assert held.is_dir()


def test_what_goes_while_it_is_looked_at_is_no_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRNN_SLIM_HOME", str(tmp_path))
    folders = [tmp_path / "work" / f"sparse-{n * 20}" for n in "12"]
    for folder in folders:
        old_folder(folder)

    def ends(name: str) -> bool:
        shutil.rmtree(folders[0], ignore_errors=True)
        return is_free(name)

    monkeypatch.setattr("flows.garbage.is_free", ends)
    assert [item.path for item in garbage(7, set(), set())] == folders[1:]


def test_what_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRNN_SLIM_HOME", str(tmp_path))
    for name in ("work/my-thesis", "stages/theatre", "work/fetched-oranges"):
        old_folder(tmp_path / name)
    old_folder(tmp_path / "elsewhere")
    (tmp_path / "stages" / SPARSE).symlink_to(tmp_path / "elsewhere")
    killed = tmp_path / "stages" / f".{PRUNE}.removed"
    old_folder(killed)
    found = garbage(7, set(), set())
    assert [item.path for item in found] == [killed]
    assert len(remove(found, 7)) == 1
    assert not killed.exists()


def test_unfinished_and_damaged_work_goes_when_it_is_old(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    for folder in (f"work/{SPARSE}", f"set-aside/{SPARSE}-2"):
        old_folder(project.home / folder)
    shown = project.run("gc").stdout
    assert f"{SPARSE}: was never finished" in shown
    assert f"{SPARSE}-2: could not be used and was set aside" in shown
    project.run("gc", "--yes")
    assert not (project.home / "work" / SPARSE).exists()
    assert not (project.home / "set-aside" / f"{SPARSE}-2").exists()


def test_without_mlflow_nothing_can_be_told_to_be_garbage(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    project.environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    refused = project.run("gc", "--older-than", "0", "--yes", code=2)
    assert "MLflow cannot be reached" in refused.stderr
