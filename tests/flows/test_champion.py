"""Which point becomes champion, what the registry then has, and that it serves."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from crnn.data.batches import Batch, Lines, evaluation_batches
from crnn.data.render import render_line
from crnn.data.sources import open_source
from flows.champion import _first_val_line, beats, best_of, model_card
from flows.experiment import ChampionSettings, load_experiment
from flows.project import timing_ground
from flows.registry import PROMOTED
from flows.servers import free_port
from flows.stages import export as stages
from flows.stages.export import _squeezed, judge
from tests.conftest import DIGITS, rendered_lines
from tests.flows.conftest import (
    Project,
    client_of,
    copy_of,
    new_project,
    squeeze,
    wait_for,
    work_of,
)

Exported = tuple[Project, dict[str, Any]]


def row(point: str, accuracy: float, size: float, ms: float) -> dict[str, Any]:
    return {
        "point": point,
        "val/word_accuracy": accuracy,
        "cost/onnx_bytes": size,
        "cost/onnx_latency_ms": ms,
        "onnx": "somewhere",
    }


ROWS = [
    row("baseline", 0.95, 4e6, 9.0),
    row("0.62", 0.955, 2e6, 3.0),
    row("0.62 int8", 0.945, 0.6e6, 2.0),
    row("0.87", 0.94, 0.9e6, 1.0),
    row("0.87 int8", 0.90, 0.2e6, 0.9),
]


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({}, "0.62 int8"),
        ({"within": 5}, "0.87 int8"),
        ({"within": 0}, "0.62"),
        ({"rule": "fastest"}, "0.87"),
        ({"rule": "most_accurate"}, "0.62"),
        ({"rule": "most_accurate", "max_mb": 1}, "0.62 int8"),
        ({"rule": "most_accurate", "max_mb": 0.1}, None),
    ],
)
def test_the_rule_chooses(settings: dict[str, Any], best: str | None) -> None:
    chosen = best_of(ROWS, ChampionSettings.model_validate(settings))
    assert (chosen and chosen["point"]) == best


def of_seeds(point: str) -> dict[str, Any]:
    """The mean of two seeds, of which the first one's file is the larger."""
    both = {
        "0": {"cost/onnx_bytes": 1.1e6, "cost/params_total": 3e5, "val/word_accuracy": 0.98},
        "3": {"cost/onnx_bytes": 0.7e6, "cost/params_total": 1e5, "val/word_accuracy": 0.92},
    }
    ends = {"val/word_accuracy_low": 0.9, "val/word_accuracy_high": 0.99, "val/samples": 100.0}
    stated = {"cost/params_total": 2e5, "timed_on": "a CPU", "stages": {}}
    return {**row(point, 0.95, 0.9e6, 1.0), **ends, **stated, "seeds": both}


def test_of_several_seeds_the_limit_is_for_the_file_that_ships() -> None:
    rows = [ROWS[0], of_seeds("0.62")]
    assert best_of(rows, ChampionSettings(max_mb=1)) is None
    assert best_of(rows, ChampionSettings(max_mb=1.2)) == rows[1]


def test_the_card_of_a_mean_says_so_and_what_its_own_file_is(tmp_path: Path) -> None:
    params = new_project(tmp_path / "project").params
    card = model_card(load_experiment(params), of_seeds("0.62"), "digest")
    assert "0.300 M parameters" in card
    assert "- File: 1.10 MB, sha256 digest" in card
    whose = "95.0% (90.0-99.0), in %, 95% interval, greedy decoding, 100 val lines, the mean of"
    assert f"{whose} seeds 0, 3; this file is seed 0's, which reads 98.0%" in card


def test_a_network_that_reads_nothing_is_no_champion() -> None:
    assert best_of([row("baseline", 0.0, 1, 1)], ChampionSettings()) is None


def test_only_the_better_one_takes_the_place() -> None:
    settings = ChampionSettings()
    assert beats(row("new", 0.94, 100, 1), row("old", 0.95, 101, 1), settings)
    assert not beats(row("new", 0.96, 100, 1), row("old", 0.95, 99, 1), settings)
    assert beats(row("new", 0.96, 100, 1), row("old", 0.95, 100, 1), settings)
    assert not beats(row("same", 0.95, 100, 1), row("same", 0.95, 100, 1), settings)


def test_the_champion_is_registered_once_and_only_a_better_one_follows(
    exported: Exported, tmp_path: Path
) -> None:
    project = copy_of(exported, tmp_path / "copy")
    printed = exported[1]
    assert "version 1 of tiny is champion" in printed["champion"]
    again = project.frontier()
    assert again["computed"] == []
    assert again["champion"].startswith("version 1 of tiny stays champion: it is ")
    other = project.frontier("--set", "champion={rule: most_accurate, max_mb: 0.001}")
    assert other["champion"].startswith("no champion: no exported point is small")
    assert other["computed"] == []
    chosen = [(Path(r["report"]) / "report.html").read_text() for r in (again, other)]
    assert ['"champion": null' in page for page in chosen] == [False, True], "pages are of a rule"
    larger = project.frontier("--set", "quantize=null")
    assert "stays champion: it has" in larger["champion"]
    client = client_of(project)
    version = client.get_model_version_by_alias("tiny", "champion")
    assert int(version.version) == 1
    assert "95% interval" in version.description
    assert "Licence of the data: not stated" in version.description
    assert f"CPU thread, on {timing_ground()}" in version.description
    tags = client.get_run(version.run_id).data.tags
    assert tags["kind"] == "point"
    assert tags["int8_key"] == version.tags["key"]
    image = tmp_path / "line.png"
    render_line(7, 3, DIGITS)[0].save(image)
    command = project.command("predict", "models:/tiny@champion", str(image), "--json")
    options = project.options()
    (tmp := tmp_path / "tmp").mkdir()
    environment = {**options.pop("env"), "TMPDIR": str(tmp)}
    reading = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, **options
    )
    assert len(json.loads(reading.stdout)["readings"]) == 1
    assert not list(tmp.rglob("*.onnx")), "what was fetched goes again"


def test_other_lines_are_read_by_the_champion_before_it_is_judged(
    exported: Exported, tmp_path: Path
) -> None:
    project, printed = exported
    made = {label: project.manifests()[label] for label in ("data", "int8 finetune 0.6")}
    work = work_of(
        project, "judge", {"data": made["data"], "export": made["int8 finetune 0.6"]}, tmp_path
    )
    scores = judge(work)[1]
    row = next(row for row in printed["rows"] if row["point"] == "0.6 int8")
    assert scores == {name: row[name] for name in scores}
    assert scores["val/samples"] == 16


def test_a_champion_is_judged_at_its_own_widest_line(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sweep's data is squeezed to 16 px, its lines of 160 px are what it serves."""
    project = exported[0]
    made = {label: project.manifests()[label] for label in ("data", "export baseline")}
    inputs = {"data": made["data"], "export": made["export baseline"]}
    work = work_of(project, "judge", inputs, tmp_path)
    as_wide = work.lines("val").widths.tolist()
    expected = judge(work)[1]
    squeeze(work, 16, tmp_path / "narrow.safetensors")
    assert max(work.lines("val").widths) == 16 < min(as_wide)
    read: list[int] = []

    def batches(lines: Lines) -> list[Batch]:
        read.extend(lines.widths.tolist())
        return list(evaluation_batches(lines))

    monkeypatch.setattr(stages, "evaluation_batches", batches)
    assert judge(work)[1] == pytest.approx(expected)
    assert read == as_wide


def test_lines_are_as_wide_as_they_are_where_the_champion_serves() -> None:
    lines = rendered_lines(40)
    narrowest, widest = int(lines.widths.min()), int(lines.widths.max())
    between = (narrowest + widest) // 2
    narrow = _squeezed(lines, between)
    assert narrow.max_width == between
    assert narrow.widths.tolist() == lines.widths.clip(max=between).tolist()
    wide = _squeezed(narrow, 320)
    assert wide.max_width == 320
    assert wide.widths.tolist() == lines.widths.tolist()


def test_a_sweep_of_other_lines_has_them_read_by_the_champion(
    exported: Exported, tmp_path: Path
) -> None:
    project = copy_of(exported, tmp_path / "copy")
    other = ["--ratios", "0.6", "--set", "quantize=null", "--set", "data.val=12"]
    result = project.frontier(*other)
    assert "judge int8 finetune 0.6" in result["computed"]
    assert result["champion"].startswith("version 1 of tiny stays champion: it has")
    client = client_of(project)
    first = client.get_model_version("tiny", "1")
    client.set_registered_model_alias("tiny", "champion", "1")
    client.set_registered_model_tag("tiny", PROMOTED, "1")
    shutil.rmtree(project.home / "stages" / first.tags["key"])
    said = project.frontier(*other)["champion"]
    lacking = "it has to be measured anew, and its file is not here"
    assert said == f"version 1 of tiny stays champion: {lacking}"


@pytest.mark.parametrize("milliseconds", [1e-6, 1e6])
def test_what_a_champion_took_elsewhere_decides_nothing(
    exported: Exported, tmp_path: Path, milliseconds: float
) -> None:
    project = copy_of(exported, tmp_path / "copy")
    client = client_of(project)
    version = client.get_model_version_by_alias("tiny", "champion")
    figures = json.loads(version.tags["figures"]) | {"cost/onnx_latency_ms": milliseconds}
    client.set_model_version_tag("tiny", version.version, "figures", json.dumps(figures))
    fastest = ["--set", "champion={rule: fastest, within: 100}", "--set", "quantize=null"]
    result = project.frontier(*fastest)
    duel = next(n for n in result["computed"] if n.startswith("latency int8 finetune 0.6 and "))
    folder = project.home / "stages" / project.manifests()[duel]["key"]
    took = json.loads((folder / "latency.json").read_text())
    stays = took["champion"]["cost/onnx_latency_ms"] <= took["best"]["cost/onnx_latency_ms"]
    assert ("stays champion" in result["champion"]) == stays


def test_a_champion_that_lacks_a_character_is_judged_by_what_it_reads(
    exported: Exported, finished: Exported, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    champion = exported[0].manifests()["int8 finetune 0.6"]
    place = Path("stages") / champion["key"]
    shutil.copytree(exported[0].home / place, project.home / place)
    digits = project.manifests()["data"]
    work = work_of(project, "judge", {"data": digits, "export": champion}, tmp_path / "work")
    assert judge(work)[1]["val/word_accuracy"] < 0.5


def test_the_example_is_the_first_line_that_can_be_read(label_folder: Path, tmp_path: Path) -> None:
    data = {"root": str(label_folder), "train": "train.txt", "val": "val.txt", "max_width": 160}
    experiment = load_experiment(new_project(tmp_path / "project", data=data).params, [])
    usable = tmp_path / "lines.safetensors"
    save_file({"val_indices": np.array([1, 2])}, usable)
    example = Image.open(io.BytesIO(_first_val_line(experiment, usable)))
    second = open_source(experiment.data, "val", 0).image(1)
    assert np.array_equal(np.asarray(example), np.asarray(second))


def test_an_alias_that_was_given_by_hand_is_left_alone(exported: Exported, tmp_path: Path) -> None:
    project = copy_of(exported, tmp_path / "copy")
    client = client_of(project)
    run = client.get_model_version_by_alias("tiny", "champion").run_id
    own = client.create_model_version("tiny", "runs:/own", run_id=run)
    client.set_registered_model_alias("tiny", "champion", own.version)
    said = project.frontier()["champion"]
    assert said == "version 2 of tiny stays champion: somebody gave it the alias by hand"


def test_an_alias_that_was_taken_back_by_hand_stays(exported: Exported, tmp_path: Path) -> None:
    project = copy_of(exported, tmp_path / "copy")
    client = client_of(project)
    before = client.get_model_version_by_alias("tiny", "champion")
    # What this program registered, worse than what it has since found.
    figures = json.loads(before.tags["figures"]) | {"cost/onnx_bytes": 1e9}
    tags = {**before.tags, "sha256": "other", "figures": json.dumps(figures)}
    worse = client.create_model_version("tiny", "runs:/own", run_id=before.run_id, tags=tags)
    client.set_registered_model_alias("tiny", "champion", worse.version)
    said = project.frontier()["champion"]
    assert said == "version 2 of tiny stays champion: somebody gave it the alias by hand"
    client.set_registered_model_tag("tiny", PROMOTED, worse.version)
    told = tmp_path / "told.json"
    said = project.frontier("--set", f"notify.command=tee {told}")["champion"]
    assert said.startswith("version 1 of tiny is champion")
    event = {"event": "champion", "experiment": "tiny", "reason": said}
    assert json.loads(told.read_text()) == event
    assert client.get_registered_model("tiny").tags[PROMOTED] == "1"


def request(address: str, content: Any) -> tuple[int, Any]:
    data = json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{address}/invocations", data, headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_champion_serves_and_survives_bad_requests(exported: Exported, tmp_path: Path) -> None:
    project, _ = exported
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.database}"}
    options = project.options()
    # MLflow starts a server by its name alone.
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment = {**options["env"], **store, **path}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"{address}/ping")
        image = tmp_path / "line.png"
        render_line(7, 3, DIGITS)[0].save(image)
        encoded = base64.b64encode(image.read_bytes()).decode()
        status, read = request(address, {"dataframe_records": [{"image": encoded}] * 2})
        assert status == 200
        (first, second) = read["predictions"]
        assert first == second
        assert set(first) == {"text", "confidence"}
        status, by_path = request(address, {"dataframe_records": [{"path": str(image)}]})
        assert by_path["predictions"] == [first]
        refusals = {
            "at most 1000 images": [{"image": encoded[:8]}] * 1001,
            "at most 20,000,000 bytes": [{"image": "A" * 26_666_668}],
            "not a readable image": [{"image": "A" * 26_666_666 + "=="}],
            "not base64": [{"image": "no base64!"}],
            "cannot be read": [{"image": base64.b64encode(b"no image").decode()}],
            "either image or path": [{"image": encoded, "path": str(image)}],
            "No such file": [{"path": "/nowhere.png"}],
        }
        for reason, records in refusals.items():
            status, answer = request(address, {"dataframe_records": records})
            assert status == 400, answer
            assert reason in answer
        assert request(address, {"dataframe_records": [{"image": encoded}]})[0] == 200
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
