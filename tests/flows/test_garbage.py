"""`crnn-slim gc`: what goes, what stays."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.flows.conftest import Project, client_of, copy_of, runs_of

Finished = tuple[Project, dict[str, Any]]


def stages(project: Project) -> set[str]:
    return {path.name for path in (project.home / "stages").iterdir()}


def test_what_a_sweep_refers_to_stays_until_its_run_is_deleted(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    before = stages(project)
    other = project.frontier("--ratios", "0.45")
    only_its_own = stages(project) - before
    assert len(only_its_own) == 4
    assert "0 folders" in project.run("gc", "--older-than", "0", "--yes").stdout
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
    assert "0 folders" in project.run("gc", "--yes").stdout, "it is not a week old"
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
    assert "0 folders" in project.run("gc", "--older-than", "0", "--yes").stdout
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
    assert "0 folders" in project.run("gc", "--older-than", "0").stdout


def test_what_a_running_stage_starts_from_stays(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    client_of(project).delete_run(finished[1]["sweep_run"])
    sparse = project.manifests()["sparse"]
    work = project.home / "work" / "prune-1"
    work.mkdir(parents=True)
    inputs = {"sparse": {"file": str(project.home / "stages" / sparse["key"] / "index.json")}}
    (work / "job.json").write_text(json.dumps({"inputs": inputs}))
    lock = project.home / "locks" / "prune-1.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        shown = project.run("gc", "--older-than", "0").stdout
    assert "finetune" in shown
    for kept in ("prune-1:", sparse["key"], *sparse["inputs"].values()):
        assert kept not in shown
    assert sparse["key"] in project.run("gc", "--older-than", "0").stdout


def test_unfinished_and_damaged_work_goes_when_it_is_old(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    old = time.time() - 8 * 86_400
    for folder in ("work/sparse-1", "set-aside/sparse-2"):
        (project.home / folder).mkdir(parents=True)
        (project.home / folder / "file").write_text("x")
        os.utime(project.home / folder / "file", (old, old))
        os.utime(project.home / folder, (old, old))
    shown = project.run("gc").stdout
    assert "sparse-1: was never finished" in shown
    assert "sparse-2: could not be used and was set aside" in shown
    project.run("gc", "--yes")
    assert not (project.home / "work" / "sparse-1").exists()
    assert not (project.home / "set-aside" / "sparse-2").exists()


def test_without_mlflow_nothing_can_be_told_to_be_garbage(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    project.environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    refused = project.run("gc", "--older-than", "0", "--yes", code=2)
    assert "MLflow cannot be reached" in refused.stderr
