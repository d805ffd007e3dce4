"""What a run leaves in MLflow, read back through MLflow's own client."""

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from flows import cache
from flows.definitions import VERSIONS
from flows.project import identity
from flows.tracking import STATE_FOLDER, Tracker
from tests.flows import commands
from tests.flows.conftest import (
    Project,
    client_of,
    copy_of,
    new_project,
    runs_of,
    wait_until,
)

Finished = tuple[Project, dict[str, Any]]


def artifacts_of(project: Project, run: Run, path: str | None = None) -> set[str]:
    return {Path(f.path).name for f in client_of(project).list_artifacts(run.info.run_id, path)}


def test_each_stage_has_one_finished_run_with_all_its_epochs(finished: Finished) -> None:
    project = finished[0]
    runs = runs_of(project, "stage")
    manifests = project.manifests()
    assert set(runs) == set(manifests)
    for label, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["stage_key"] == manifests[label]["key"]
    for label, epochs in (("baseline", 2), ("sparse", 4), ("finetune 0.3", 1)):
        for metric in (
            "train/loss",
            "train/learning_rate",
            "train/lines_per_second",
            "val/word_accuracy",
            "val/ned",
            "gamma/q50",
            "gamma/share_near_zero",
        ):
            history = client_of(project).get_metric_history(runs[label].info.run_id, metric)
            assert [m.step for m in history] == list(range(1, epochs + 1)), (label, metric)
        last = project.manifests()[label]["metrics"]
        assert last.items() <= runs[label].data.metrics.items()
    assert runs["sparse"].data.metrics["readiness/free_ratio"] >= 0.6


def test_artifacts_hold_what_is_needed_to_understand_a_run(finished: Finished) -> None:
    project = finished[0]
    runs = runs_of(project, "stage")
    baseline = artifacts_of(project, runs["baseline"])
    assert {"model.safetensors", "settings.json", "environment.json", "summary.txt"} <= baseline
    assert {"charset.txt", "check.json", "bad_samples.csv"} <= artifacts_of(project, runs["data"])
    assert {"summary.txt", "widths.json"} <= artifacts_of(project, runs["prune 0.3"])
    assert artifacts_of(project, runs["sparse"], "gammas") == {
        f"epoch-{epoch:04d}.npz" for epoch in range(1, 5)
    }
    images = {name for name in artifacts_of(project, runs["sparse"], "images") if "png" in name}
    assert len(images) == 4
    assert runs["data"].data.params["fingerprint"]
    assert runs["baseline"].data.params["train.epochs"] == "2"


def test_the_sweep_holds_the_frontier_and_its_points_lead_to_their_stages(
    finished: Finished,
) -> None:
    project = finished[0]
    (sweep,) = runs_of(project, "sweep").values()
    assert sweep.info.run_id == finished[1]["sweep_run"]
    assert {
        "frontier.csv",
        "frontier.json",
        "frontier.png",
        "report.html",
        "experiment.json",
    } <= artifacts_of(project, sweep)
    points = runs_of(project, "point")
    stages = {run.info.run_id: run for run in runs_of(project, "stage").values()}
    assert set(points) == {"baseline", "0.3", "0.6"}
    for row in finished[1]["rows"]:
        point = points[row["point"]]
        link = (
            f"[{row['point']}](#/experiments/{sweep.info.experiment_id}/runs/{point.info.run_id})"
        )
        assert link in sweep.data.tags["mlflow.note.content"]
        assert f"/runs/{sweep.info.run_id})" in point.data.tags["mlflow.note.content"]
        assert point.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        for name in ("val/word_accuracy", "cost/params_total", "cost/macs", "prune/ratio_achieved"):
            assert point.data.metrics[name] == row[name]
        for stage in row["stages"]:
            assert stages[point.data.tags[f"{stage}_run"]].data.tags["stage"] == stage


def test_running_again_adds_no_run(finished: Finished) -> None:
    project = finished[0]
    client = client_of(project)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    before = len(client.search_runs([experiment]))
    project.frontier()
    assert len(client.search_runs([experiment])) == before


def test_a_store_that_cannot_be_reached_costs_nothing_and_is_filled_later(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    project.environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    run = project.run("frontier", str(project.params), "--json", "--ratios", "0.5")
    result = json.loads(run.stdout)
    assert result["sweep_run"] is None
    new = ["finetune 0.5", "latency", "measure finetune 0.5", "prune 0.5"]
    assert sorted(result["computed"]) == new
    assert run.stderr.count("MLflow cannot be reached") == 1

    project.environment = {}
    assert "finetune 0.5" not in runs_of(project, "stage")
    again = project.frontier("--ratios", "0.5")
    assert again["computed"] == []
    assert again["sweep_run"]
    late = runs_of(project, "stage")["finetune 0.5"]
    history = client_of(project).get_metric_history(late.info.run_id, "train/loss")
    assert [m.step for m in history] == [1]


def test_no_stage_waits_for_a_store_that_does_not_answer(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        warnings: list[str] = []
        begun = time.monotonic()
        tracker = Tracker("tiny", warnings.append)
        for folder in project.home.glob("stages/*"):
            tracker.finish(cache.verified(folder))
        assert time.monotonic() - begun < 4, "the store is given five seconds to answer"
        assert tracker.sweep("tiny", "sweep-1", [], {}, tmp_path) is None
    assert len(warnings) == 1


def test_a_store_that_cannot_be_written_is_one_sentence(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    read_only = f"sqlite:///file:{project.database}?mode=ro&uri=true"
    project.environment = {"MLFLOW_TRACKING_URI": read_only}
    arguments = ["frontier", str(project.params), "--ratios", "0.3"]
    # MLflow makes a folder named file: where it is run.
    run = commands.run(arguments, tmp_path, project.options()["env"])
    assert run.returncode == 0
    reason = "MLflow cannot be reached ((sqlite3.OperationalError) attempt to write a readonly"
    assert run.stderr.count(reason) == 1
    assert "Traceback" not in run.stderr


def without_store(finished: Finished, folder: Path) -> tuple[Project, Path]:
    """The finished project of which MLflow knows nothing, and where its store will be."""
    project = copy_of(finished, folder)
    store = project.database
    store.unlink()
    return project, store


def test_a_store_that_is_back_before_the_end_is_filled_by_the_same_run(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, store = without_store(finished, tmp_path / "copy")
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    warnings: list[str] = []
    tracker = Tracker("tiny", warnings.append)
    for folder in project.home.glob("stages/*"):
        tracker.finish(cache.verified(folder))
    wait_until(lambda: warnings)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    report = Path(finished[1]["report"])
    assert tracker.sweep("tiny", "sweep-1", finished[1]["rows"], {}, report)
    runs = runs_of(project, "stage")
    assert set(runs) == set(project.manifests())
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(warnings) == 1


def test_a_stage_that_ends_before_its_beginning_is_recorded_is_finished(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, store = without_store(finished, tmp_path / "copy")
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    folders = {folder.name.split("-")[0]: folder for folder in project.home.glob("stages/*")}
    short, other = (cache.verified(folders[stage]) for stage in ("data", "baseline"))
    begun = cache.Stage("data", "data", short.settings, {}, VERSIONS["data"])
    assert begun.key == short.key
    tracker = Tracker("tiny", print)  # It connects, while all this happens.
    tracker.finish(other)
    tracker.begin(begun)
    tracker.finish(short)
    tracker.ask(lambda: None)
    assert {run.info.status for run in runs_of(project, "stage").values()} == {"FINISHED"}


def test_a_process_that_dies_while_it_makes_the_store_leaves_none(tmp_path: Path) -> None:
    project = new_project(tmp_path, fresh=True)
    store = project.database
    unfinished = store.with_name("mlflow.db.unfinished")
    process = subprocess.Popen(project.command("gc"), stdout=subprocess.PIPE, **project.options())
    wait_until(lambda: unfinished.exists() and unfinished.stat().st_size, process)
    process.kill()
    process.communicate()
    assert unfinished.exists()
    assert not store.exists()
    project.run("gc")
    assert not unfinished.exists()
    assert client_of(project).search_experiments()


def test_an_experiment_that_was_deleted_in_mlflow_is_brought_back(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    client = client_of(project)
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    result = project.frontier()
    assert result["computed"] == []
    assert client.get_run(result["sweep_run"]).info.status == "FINISHED"


def test_a_sweep_with_another_set_of_ratios_is_another_run(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    other = project.frontier("--ratios", "0.6")
    assert other["computed"] == ["latency"], "side by side with others than before"
    assert other["sweep_run"] != finished[1]["sweep_run"]
    assert len(other["rows"]) == 2


def test_runs_of_dead_processes_are_marked_and_explained(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    client = client_of(project)
    experiment = client.get_experiment_by_name("tiny")
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    tags = {"kind": "stage", "stage_key": "sparse-1", STATE_FOLDER: identity()}
    dead = client.create_run(experiment.experiment_id, tags=tags)
    monkeypatch.setenv("CRNN_SLIM_HOME", str(finished[0].home))
    of_the_original = {**tags, STATE_FOLDER: identity()}
    other = client.create_run(experiment.experiment_id, tags=of_the_original)
    project.frontier()
    found = client.get_run(dead.info.run_id)
    assert found.info.status == "KILLED"
    assert "process that computed this died" in found.data.tags["mlflow.note.content"]
    assert client.get_run(other.info.run_id).info.status == "RUNNING"
