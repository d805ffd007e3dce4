"""The whole pipeline, really run: Prefect, MLflow, processes, files."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.flows.commands import PATIENCE
from tests.flows.conftest import (
    LONG,
    TINY,
    Project,
    begun_by,
    children_of,
    client_of,
    copy_of,
    new_project,
    runs_of,
    wait_until,
)

Finished = tuple[Project, dict[str, Any]]


def test_the_frontier_has_a_row_for_the_baseline_and_each_ratio(finished: Finished) -> None:
    rows = finished[1]["rows"]
    assert [row["point"] for row in rows] == ["baseline", "0.3", "0.6"]
    for row in rows:
        assert 0 <= row["val/word_accuracy_low"] <= row["val/word_accuracy"] <= 1
        assert row["val/samples"] == 16
        assert row["cost/latency_ms"] > 0
    for cost in ("cost/params_total", "cost/macs", "cost/bytes"):
        costs = [row[cost] for row in rows]
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) == 3
    total = sum((6, 6, 13, 13, 26, 26, 51, 51, 51, 51))
    for row, ratio in zip(rows[1:], (0.3, 0.6), strict=True):
        assert row["prune/ratio_achieved"] == int(total * ratio) / total


def test_every_stage_was_computed_once(finished: Finished) -> None:
    labels = ["baseline", "data", "finetune 0.3", "finetune 0.6", "latency", "measure baseline"]
    labels += ["measure finetune 0.3", "measure finetune 0.6", "prune 0.3", "prune 0.6", "sparse"]
    assert sorted(finished[1]["computed"]) == labels
    assert sorted(finished[0].manifests()) == labels


def test_the_sparse_stage_reaches_its_target(finished: Finished) -> None:
    metrics = finished[0].manifests()["sparse"]["metrics"]
    assert metrics["gamma/share_zero"] == pytest.approx(0.6, abs=0.005)


def test_the_report_is_there(finished: Finished) -> None:
    folder = Path(finished[1]["report"])
    assert json.loads((folder / "frontier.json").read_text()) == finished[1]["rows"]
    assert (folder / "frontier.csv").read_text().startswith("point,")
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "frontier.md").read_text().startswith("| point | cut |")
    for row in finished[1]["rows"]:
        assert (finished[0].home / row["checkpoint"]).is_file()
    page = (folder / "report.html").read_text()
    assert "<script src=" not in page


def test_the_same_command_computes_nothing_even_with_a_prefect_server_of_its_own(
    finished: Finished, tmp_path: Path
) -> None:
    project = Project(finished[0].folder, {"PREFECT_HOME": str(tmp_path / "prefect")})
    environment = project.options()["env"]
    del environment["PREFECT_API_URL"]
    command = project.command("frontier", str(project.params), "--json")
    run = subprocess.run(
        command, env=environment, capture_output=True, check=True, timeout=PATIENCE
    )
    assert json.loads(run.stdout) == {**finished[1], "computed": []}


def test_a_new_ratio_computes_its_own_stages_only(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    ratios = ["--ratios", "0.3,0.6,0.65"]
    run = project.run("frontier", str(project.params), "--json", *ratios)
    new = ["finetune 0.65", "latency", "measure finetune 0.65", "prune 0.65"]
    assert sorted(json.loads(run.stdout)["computed"]) == new
    # 0.6 is what the sparse stage was asked for, so that only a cut beyond it costs anything.
    warned = [line for line in run.stderr.splitlines() if "live channels go" in line]
    assert [line.split(":")[0] for line in warned] == ["prune 0.65"]
    assert "ratio 0.65 is above sparse.target_ratio 0.6: live channels will go" in run.stderr
    fours = ["--ratios", "0.6", "--set", "prune.round_to=4"]
    rounded = project.run("frontier", str(project.params), "--json", *fours)
    achieved = json.loads(rounded.stdout)["rows"][1]["prune/ratio_achieved"]
    assert f"prune 0.6: only {100 * achieved:.1f}% of the channels go" in rounded.stderr


@pytest.mark.parametrize("rows", [0, 2])
def test_a_smaller_lstm_and_head_go_through_every_stage(
    finished: Finished, tmp_path: Path, rows: int
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    cuts = ["prune.lstm_ratio=0.5", "prune.head_rank=3", f"prune.head_rows={rows}"]
    smaller = ["--ratios", "0.3", *(part for setting in cuts for part in ("--set", setting))]
    result = project.frontier(*smaller)
    new = ["finetune 0.3", "latency", "measure finetune 0.3", "prune 0.3"]
    assert sorted(result["computed"]) == new
    row = result["rows"][1]
    assert row["cost/params_head"] == 3 * (2 * 4 + 11) + rows * 2 * 4 + 11
    seen = json.loads(project.run("preview", str(project.params), *smaller, "--json").stdout)
    assert [seen["cuts"][0][name] for name in ("params", "macs")] == [
        row["cost/params_total"],
        row["cost/macs"],
    ]
    image = tmp_path / "line.png"
    Image.new("RGB", (96, 32), "white").save(image)
    checkpoint = str(project.home / row["checkpoint"])
    read = json.loads(project.run("predict", checkpoint, str(image), "--json").stdout)
    assert [reading["image"] for reading in read["readings"]] == [str(image)]
    useless = project.run(
        "preview", str(project.params), *smaller, "--set", "prune.head_rank=5", code=2
    )
    sum_of_weights = {0: "5 x (8 + 11) = 95", 2: "5 x (8 + 11) + 2 x 8 = 111"}[rows]
    rule = f"prune.head_rank has to make the head smaller; {sum_of_weights} weights are no less"
    assert f"{rule} than its 88" in useless.stderr


def test_a_damaged_stage_is_computed_again_to_the_same_bits(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    folder = project.home / "stages" / project.manifests()["sparse"]["key"]
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(before[:-1] + b"?")
    run = project.run("frontier", str(project.params), "--json")
    assert json.loads(run.stdout)["computed"] == ["sparse"]
    assert "model.safetensors has other bytes than its manifest says; set aside" in run.stderr
    assert (folder / "model.safetensors").read_bytes() == before
    run_id = runs_of(project, "stage")["sparse"].info.run_id
    client = client_of(project)
    assert client.get_run(run_id).info.status == "FINISHED"
    losses = client.get_metric_history(run_id, "train/loss")
    assert [metric.step for metric in losses] == [1, 2, 3, 4]


def start_and_wait_for(project: Project, text: str) -> subprocess.Popen[str]:
    """Start a frontier and read its progress until a line has the text."""
    process = subprocess.Popen(
        project.command("frontier", str(project.params)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        **project.options(),
    )
    assert process.stderr
    for line in process.stderr:
        if text in line:
            return process
    pytest.fail(f"{text!r} was never printed")


def states_of_flows(project: Project) -> list[str]:
    """Prefect's states of all runs of a project, sorted."""
    code = (
        "from prefect.client.orchestration import get_client\n"
        "from flows.project import identity\n"
        "own = identity()\n"
        "with get_client(sync_client=True) as client:\n"
        "    print(*[r.state.type.value for r in client.read_flow_runs() if own in r.tags])\n"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(
        command, **project.options(), stdout=subprocess.PIPE, check=True
    ).stdout
    return sorted(printed.split())


def weights(project: Project, label: str) -> dict[str, bytes]:
    key = project.manifests()[label]["key"]
    tensors = load_file(project.home / "stages" / key / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def cancelling(name: str) -> Callable[[subprocess.Popen[str]], object]:
    """Ask for the cancel of a running flow, as the button in Prefect's page does."""
    code = (
        "from prefect.client.orchestration import get_client\n"
        "from prefect.states import Cancelling\n"
        "with get_client(sync_client=True) as client:\n"
        "    for run in client.read_flow_runs():\n"
        f"        if run.name == {name!r} and run.state.is_running():\n"
        "            client.set_flow_run_state(run.id, Cancelling())\n"
    )
    return lambda process: subprocess.run([sys.executable, "-c", code], check=True)


def sending(sent: signal.Signals) -> Callable[[subprocess.Popen[str]], object]:
    return lambda process: process.send_signal(sent)


STOPS = [
    (sending(signal.SIGKILL), -signal.SIGKILL, "RUNNING"),
    (sending(signal.SIGINT), 130, "KILLED"),
    (sending(signal.SIGTERM), 143, "KILLED"),
    (cancelling("stopped"), 143, "KILLED"),
]
"""A way to stop a pipeline, its exit code, and the stage's state in MLflow after it."""


def test_a_pipeline_stopped_in_every_way_ends_in_the_same_bits(
    undisturbed: Project, finished: Finished, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    # Who stops a run wants it stopped, not tried again, and need not be told that it failed.
    tried_again = {"execution": {**LONG["execution"], "retries": 1}}
    notified = {"notify": {"command": f"touch {told}"}}
    changes = {**LONG, **tried_again, **notified, "name": "stopped"}
    project = begun_by(finished, tmp_path / "stopped", **changes)
    for stop, code, in_mlflow in STOPS:
        process = start_and_wait_for(project, "sparse: epoch")
        workers = children_of(process.pid)
        assert workers
        # No stage waits until MLflow has its run.
        wait_until(lambda: client_of(project).get_experiment_by_name("stopped") is not None)
        wait_until(lambda: "sparse" in runs_of(project, "stage", "stopped"))
        stop(process)
        # Tests run beside this one; what is promised, five seconds, the torture holds it to.
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            if time.monotonic() > deadline:
                process.kill()
                process.communicate()
                pytest.fail(f"training went on after the stop that ends in {code}")
            time.sleep(0.1)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        assert runs_of(project, "stage", "stopped")["sparse"].info.status == in_mlflow

    assert not told.exists()
    run = project.run("frontier", str(project.params), "--json")
    assert states_of_flows(project) == [*["CANCELLED"] * 3, "COMPLETED", "CRASHED"]
    computed = json.loads(run.stdout)["computed"]
    assert "baseline" not in computed
    assert "sparse" in computed
    assert "sparse: goes on after epoch" in run.stderr
    for label in ("sparse", "prune 0.6", "finetune 0.6"):
        assert weights(project, label) == weights(undisturbed, label), label
    history = project.home / "stages" / project.manifests()["sparse"]["key"] / "history.jsonl"
    epochs = [json.loads(line)["epoch"] for line in history.read_text().splitlines()]
    assert epochs == list(range(1, 25))


def test_two_pipelines_at_once_compute_each_stage_once(tmp_path: Path) -> None:
    project = new_project(tmp_path / "twice", fresh=True)
    command = project.command("frontier", str(project.params), "--json")
    pair = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **project.options()
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=PATIENCE) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    computed = [label for output, _ in results for label in json.loads(output)["computed"]]
    assert len(computed) == len(set(computed)) == 11
    first, second = (json.loads(output)["rows"] for output, _ in results)
    assert first == second


def test_prefect_shows_stages_by_name_and_cached_where_cached(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    project.params.write_text(
        project.params.read_text(encoding="utf-8").replace("name: tiny", "name: shown"),
        encoding="utf-8",
    )
    shutil.rmtree(project.home / "stages" / project.manifests()["measure baseline"]["key"])
    project.frontier()
    code = (
        "import asyncio, json\n"
        "from prefect.client.orchestration import get_client\n"
        "async def main():\n"
        "    async with get_client() as client:\n"
        "        runs = await client.read_flow_runs()\n"
        "        (run,) = [r for r in runs if r.name == 'shown']\n"
        "        tasks = [t for t in await client.read_task_runs() if t.flow_run_id == run.id]\n"
        "        found = [a for a in await client.read_artifacts() if a.flow_run_id == run.id]\n"
        "        print(json.dumps({t.name: t.state.name for t in tasks}))\n"
        "        print(json.dumps([[a.key, a.type, a.description, a.data] for a in found]))\n"
        "asyncio.run(main())\n"
    )
    result = subprocess.run(
        [project.command()[0], "-c", code], capture_output=True, check=True, **project.options()
    )
    states, artifacts = (json.loads(line) for line in result.stdout.splitlines()[-2:])
    assert set(states) == set(project.manifests())
    assert {label for label, state in states.items() if state == "Completed"} == {
        "measure baseline"
    }
    assert set(states.values()) == {"Completed", "Cached"}
    shown = {(key, kind): (description, data) for key, kind, description, data in artifacts}
    assert shown["progress-shown", "progress"] == ("11 of 11 stages", 100)
    description = shown["frontier-shown", "table"][0]
    assert "[sparse 0.3](http://127.0.0.1:5000/#/experiments/" in description


def test_what_is_cached_is_found_without_torch(finished: Finished) -> None:
    project = finished[0]
    code = (
        "import sys\n"
        "from flows.cli import main\n"
        f"sys.argv = ['crnn-slim', 'frontier', {str(project.params)!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
        "print(sorted({'torch', 'torchinfo', 'timm', 'matplotlib'} & set(sys.modules)))\n"
    )
    command = [project.command()[0], "-c", code]
    result = subprocess.run(command, capture_output=True, check=True, **project.options())
    assert "everything was cached" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_trained_checkpoint_of_one_s_own_is_taken_as_the_baseline(
    finished: Finished, tmp_path: Path, elsewhere: bool
) -> None:
    """As this program wrote it, or trained elsewhere: its tensors have the article's names."""
    source = finished[0]
    key = source.manifests()["baseline"]["key"]
    trained = source.home / "stages" / key / "model.safetensors"
    own = tmp_path / "own.safetensors"
    if elsewhere:
        tensors = {n.replace("cnn.", "backbone.feature."): t for n, t in load_file(trained).items()}
        save_file(tensors, theirs := tmp_path / "theirs.safetensors")
        (charset := tmp_path / "charset.txt").write_text("0123456789")
        source.run("convert-checkpoint", str(theirs), str(own), "--charset", str(charset))
    else:
        shutil.copy(trained, own)
    project = new_project(
        tmp_path / "p", baseline={"checkpoint": str(own), "epochs": 0}, ratios=[0.3]
    )
    row = project.frontier()["rows"][0]
    assert row["val/word_accuracy"] == finished[1]["rows"][0]["val/word_accuracy"]
    assert weights(project, "baseline") == weights(source, "baseline")

    letters = {**TINY["data"], "text": {"alphabet": "ABC"}}
    untrained = {"checkpoint": str(own), "epochs": 0}
    other = new_project(tmp_path / "o", data=letters, baseline=untrained)
    refused = other.run("frontier", str(other.params), code=2)
    assert "its character 1 is '0', that of the data 'A'; set data.charset" in refused.stderr
    gone = other.run("frontier", str(other.params), "--set", "baseline.checkpoint=gone", code=2)
    assert "no checkpoint file at gone" in gone.stderr
    none = other.run("frontier", str(other.params), "--set", "baseline.checkpoint=null", code=2)
    assert "epochs may be 0 only where a checkpoint is given" in none.stderr
