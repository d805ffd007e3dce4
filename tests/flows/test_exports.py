"""Exports as stages: behind every point, measured, and read with."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, load_checkpoint, reader_of, save_checkpoint
from crnn.data.render import render_line
from crnn.export import export_onnx
from crnn.files import sha256
from crnn.reading import Reader, load_exported
from crnn.settings import ExportSettings
from flows import cache, definitions, project
from flows.experiment import load_experiment
from flows.rows import BASELINE, TRAINED, Variant
from flows.stages.export import (
    TOLERANCE,
    _are_tied,
    _read_with_both,
    _write_program,
    opened,
)
from flows.stages.latency import latency
from flows.stages.work import Work
from tests.conftest import CORES, DIGITS, on_cores, random_recogniser, rendered_lines
from tests.flows.conftest import Project, copy_of, points_of, squeeze, work_of

Finished = tuple[Project, dict[str, Any]]


def test_of_all_stages_the_timing_alone_depends_on_the_machine(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRNN_SLIM_HOME", str(finished[0].home))
    experiment = load_experiment(finished[0].params)
    row = finished[1]["rows"][0]
    stages = {name: cache.find(key, print) for name, key in row["stages"].items()}
    made = {name: manifest for name, manifest in stages.items() if manifest}
    network = Variant(BASELINE, {name: made[name] for name in ("data", BASELINE)})

    def keys() -> tuple[list[str], str]:
        of_network = [
            definitions.baseline_stage(experiment, made, 0).key,
            definitions.measure_stage(network).key,
        ]
        return of_network, definitions.latency_stage(experiment, [network], 0).key

    here, timed_here = keys()
    assert here == [row["stages"][name] for name in (BASELINE, "measure")]
    assert row["timed_on"] == made["latency"].settings["timed_on"] == project.timing_ground()
    monkeypatch.setattr(project, "processor", lambda: "another CPU")
    there, timed_there = keys()
    assert here == there
    assert timed_here != timed_there
    monkeypatch.undo()
    monkeypatch.setenv("CRNN_SLIM_HOME", str(finished[0].home))
    on = {}
    for count in (1, 2, 3):
        monkeypatch.setattr(project, "cores", lambda count=count: list(range(count)))
        on[count] = keys()[1]
    assert on[1] != on[2] == on[3], "a second core has more to time, a third one has not"


def test_a_network_that_ships_without_its_branches_is_timed_in_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "repvgg.safetensors"
    model = random_recogniser(1, backbone="repvgg_a0").float()
    save_checkpoint(file, Checkpoint(model, Charset("0123456789"), 160, BASELINE))
    given = {"file": str(file), "sha256": sha256(file)}
    job = {"inputs": {f"{TRAINED} {BASELINE}": given}, "cpus": 1, "settings": {"threads": [1]}}
    figures = json.loads((tmp_path / latency(Work(job, tmp_path, tmp_path, print))[0]).read_text())
    both = {"cost/latency_ms", "cost/latency_deployed_ms"}
    assert both <= set(figures[BASELINE])
    assert all(figures[BASELINE][name] > 0 for name in both)


def test_every_point_is_exported_measured_and_reads_the_same(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    exporting = ("--set", "export={pt2: true}", "--set", "quantize=null", "--set", "champion=null")
    with on_cores(CORES):
        result = project.frontier(*exporting)
    networks = ("baseline", "finetune 0.3", "finetune 0.6")
    computed = [f"{what} {network}" for what in ("export", "measure") for network in networks]
    assert sorted(result["computed"]) == sorted([*computed, "latency"])
    for row, before in zip(result["rows"], finished[1]["rows"], strict=True):
        assert row["val/word_accuracy"] == before["val/word_accuracy"]
        assert row["export/max_difference"] < 1e-4
        path = project.home / row["onnx"]
        assert row["cost/onnx_bytes"] == path.stat().st_size
        assert row["cost/onnx_latency_ms"] > 0
        assert {f"latency/onnx_32x128_{n}t_ms" in row for n in (1, min(len(CORES), 2))} == {True}
        program = torch.export.load(path.with_name("model.pt2")).module(check_guards=False)
        assert program(torch.zeros(1, 32, 64, 3, dtype=torch.uint8)).shape == (1, 16, 11)
        exported = load_exported(path)
        assert (
            exported.provenance.get("ratio") == row["prune/ratio_requested"]
            or not row["prune/ratio_requested"]
        )
        assert exported.charset.characters == "0123456789"
    recorded = points_of(project, result["sweep_run"])["0.6"].data
    assert recorded.metrics["cost/onnx_latency_ms"] == row["cost/onnx_latency_ms"]
    image = tmp_path / "line.png"
    render_line(7, 3, DIGITS)[0].save(image)
    readings = [
        json.loads(
            project.run(
                "predict", str(project.home / row[kind]), *[str(image)] * 2, "--json"
            ).stdout
        )
        for kind in ("checkpoint", "onnx")
    ]
    assert [len(r["readings"]) for r in readings] == [2, 2]
    one, other = (r["readings"][0] for r in readings)
    assert one["text"] == other["text"]
    assert abs(one["confidence"] - other["confidence"]) < 1e-4
    with on_cores(CORES):
        assert project.frontier(*exporting)["computed"] == []


def test_a_frontier_says_how_far_each_network_is_from_the_baseline(exported: Finished) -> None:
    baseline, *others = exported[1]["rows"]
    assert "ahead/baseline" not in baseline
    for row in others:
        ahead, low, high = (row[f"ahead/baseline{end}"] for end in ("", "_low", "_high"))
        assert ahead == pytest.approx(row["val/word_accuracy"] - baseline["val/word_accuracy"])
        assert low < ahead < high
    table = (Path(exported[1]["report"]) / "frontier.md").read_text(encoding="utf-8")
    cut = others[1]
    assert "int8" not in cut
    assert f"| {cut['point']} | " in table
    assert f" | {100 * cut['ahead/baseline']:+.1f} (" in table


def test_an_export_starts_no_threads_beyond_a_stage_s_cores(
    finished: Finished, tmp_path: Path
) -> None:
    network = load_checkpoint(finished[0].home / finished[1]["rows"][0]["checkpoint"])
    export_onnx(tmp_path / "model.onnx", network, ExportSettings(), {})
    before = len(list(Path("/proc/self/task").iterdir()))
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reader = opened(tmp_path / "model.onnx")
    finally:
        torch.set_num_threads(cores)
    assert len(list(Path("/proc/self/task").iterdir())) == before
    assert reader.charset == network.charset


def test_the_program_is_held_against_lines_of_one_character_too(
    exported: Finished, tmp_path: Path
) -> None:
    project = exported[0]
    made = {label: project.manifests()[label] for label in ("data", "finetune 0.6")}
    inputs = {"data": made["data"], "model": made["finetune 0.6"]}
    work = work_of(project, "export", inputs, tmp_path, of={})
    squeeze(work, 16, tmp_path / "narrow.safetensors")
    _write_program(work, load_checkpoint(work.input("model")), ExportSettings(pt2=True))
    assert (work.out / "model.pt2").exists()


def test_a_probability_that_is_no_number_is_a_difference() -> None:
    model = random_recogniser().float()
    broken = copy.deepcopy(model)
    next(broken.cnn.parameters()).data.view(-1)[0] = math.nan
    charset = Charset("0123456789")
    readers = [reader_of(Checkpoint(m, charset, 320, "baseline")) for m in (model, broken)]
    difference = _read_with_both(readers[0], readers[1], rendered_lines(4))[1]
    assert not difference <= TOLERANCE


def test_a_tie_between_classes_is_no_difference() -> None:
    line = np.array([[[0.8, 0.1, 0.1], [0.2, 0.40004, 0.39996], [0.2, 0.5, 0.3]]])
    network = Reader(lambda _: (line, line), lambda _: line, Charset("ab"), 320, 4, {})
    pixels = np.zeros((1, 32, 12, 3), np.uint8)
    for other, tied in (([0, 2, 1], True), ([0, 1, 2], False), ([0, 2, 2], False)):
        assert _are_tied(network, pixels, np.array([0, 1, 1]), np.array(other)) is tied
