"""Points in 8 bits, and what is done where rounding costs too much."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from crnn.checkpoint import load_checkpoint
from flows.cache import HISTORY, MANIFEST, MODEL, _parsed, _sealed
from flows.rows import Variant, _cut_figures
from flows.stages.quantize import _within_budget, points_lost, qat
from tests.flows.commands import PATIENCE
from tests.flows.conftest import Project, copy_of, points_of, work_of
from tests.flows.test_controls import PRUNED

TRAINING = {"epochs": 2, "batch_size": 16, "learning_rate": 2e-4}
Exported = tuple[Project, dict[str, Any]]


def test_every_point_has_one_in_8_bits(exported: Exported) -> None:
    project, printed = exported
    names = [row["point"] for row in printed["rows"]]
    assert names == ["baseline", "baseline int8", "0.3", "0.3 int8", "0.6", "0.6 int8"]
    rows = {row["point"]: row for row in printed["rows"]}
    for name in names[::2]:
        exact, rounded = rows[name], rows[f"{name} int8"]
        path = project.home / rounded["onnx"]
        assert any("Quantize" in node.op_type for node in onnx.load(path).graph.node)
        assert rounded["cost/bytes"] == rounded["cost/onnx_bytes"] == path.stat().st_size
        assert rounded["cost/bytes"] < exact["cost/onnx_bytes"]
        assert rounded["cost/params_total"] == exact["cost/params_total"]
        assert rounded["quantize/layers"] + rounded["quantize/layers_in_float"] == 13
        assert rounded["quantize/drop"] <= 0.3
        assert "cost/latency_ms" not in rounded, "torch computes it in float"
        assert rounded["latency/onnx_32x128_1t_low_ms"] <= rounded["latency/onnx_32x128_1t_high_ms"]
        for case in ("1x64_1t", "1x128_1t", "1x256_1t", "32x128_1t"):
            across = exact[f"speedup/onnx_{case}_over_torch"] * exact[f"latency/onnx_{case}_ms"]
            assert across == pytest.approx(rows["baseline"][f"latency/torch_{case}_ms"])
            same = rounded[f"speedup/onnx_{case}"] * rounded[f"latency/onnx_{case}_ms"]
            assert same == pytest.approx(rows["baseline int8"][f"latency/onnx_{case}_ms"])
        assert rounded["val/samples"] == 16
    recorded = points_of(project, printed["sweep_run"])["0.6 int8"].data
    assert recorded.metrics["cost/bytes"] == rows["0.6 int8"]["cost/bytes"]


def test_a_cut_is_told_once_whatever_its_network_is_trained_on_for() -> None:
    told = {"prune/ratio_requested": 0.3, "prune/ratio_achieved": 0.3, "prune/channels_kept": 9.0}
    metrics = {**told, "prune/live_channels_removed": 2.0, "val/word_accuracy": 0.5}
    stages = {"prune": replace(PRUNED, metrics=metrics), "finetune": PRUNED}
    assert "prune/live_channels_removed" in _cut_figures(Variant("0.3", stages), None)
    again = Variant("0.3 qat", {**stages, "qat": PRUNED})
    assert _cut_figures(again, None) == told


def test_layers_that_cost_too_much_stay_in_float() -> None:
    costs = {"a": 1, "b": 10, "c": 1, "d": 5}

    def chosen(budget: float) -> tuple[list[str], float]:
        def quantized(layers: Sequence[str]) -> Any:
            return sum(costs[layer] for layer in layers)

        def same(cost: Any) -> float:
            return float(cost)

        return _within_budget(list(costs), quantized, same, same, budget)

    assert chosen(20) == (["a", "b", "c", "d"], 17)
    assert chosen(10) == (["a", "c", "d"], 7)
    assert chosen(3) == (["a", "c"], 2)
    assert chosen(1) == (["a"], 1)
    assert chosen(0.5) == ([], 0)


def test_a_budget_allows_what_it_names_to_the_line() -> None:
    for read in range(1000, 2001):
        assert points_lost(read / 2000, (read - 6) / 2000) <= 0.3
        assert points_lost(read / 2000, (read - 7) / 2000) > 0.3


def test_a_network_is_trained_on_for_8_bits(exported: Exported, tmp_path: Path) -> None:
    project, _ = exported
    made = {label: project.manifests()[label] for label in ("data", "finetune 0.6")}
    inputs = {"data": made["data"], "model": made["finetune 0.6"]}
    work = work_of(project, "qat", inputs, tmp_path, seed=0, train=TRAINING)
    result, metrics = qat(work)
    assert result == MODEL
    assert metrics["val/samples"] == 16
    assert len((work.out / HISTORY).read_text().splitlines()) == 2
    before = load_checkpoint(work.input("model")).model.state_dict()
    after = load_checkpoint(work.out / result).model.state_dict()
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert not torch.equal(before["cnn.0.weight"], after["cnn.0.weight"])


def test_where_layers_stay_in_float_a_network_trained_for_8_bits_is_a_point_more(
    exported: Exported, tmp_path: Path
) -> None:
    project = copy_of(exported, tmp_path / "copy")
    key = project.manifests()["int8 finetune 0.3"]["key"]
    written = project.home / "stages" / key / MANIFEST
    manifest = _parsed(written.read_bytes(), key)
    manifest.metrics["quantize/layers_in_float"] = 1.0
    written.write_bytes(_sealed(manifest))
    found = project.frontier("--ratios", "0.3", "--set", "quantize.epochs=1")
    assert "qat finetune 0.3" in found["computed"]
    rows = {row["point"]: row for row in found["rows"]}
    assert list(rows) == ["baseline", "baseline int8", "0.3", "0.3 int8", "0.3 qat int8"]
    trained = rows["0.3 qat int8"]["stages"]
    assert trained["finetune"] == rows["0.3"]["stages"]["finetune"]
    assert trained["int8"] != rows["0.3 int8"]["stages"]["int8"]
    page = (Path(found["report"]) / "report.html").read_text()
    (content,) = re.findall(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)
    assert len(json.loads(content)["curves"]["0.3 qat int8"]["accuracy"]) == 1


def test_two_processes_train_for_8_bits_as_one_does(exported: Exported, tmp_path: Path) -> None:
    project, _ = exported
    made = {label: project.manifests()[label] for label in ("data", "finetune 0.6")}
    inputs = {"data": made["data"], "model": made["finetune 0.6"]}
    settings = {"seed": 0, "train": {**TRAINING, "precision": "float32"}}
    losses = []
    for processes in (1, 2):
        work = work_of(project, "qat", inputs, tmp_path / str(processes), **settings)
        job = {
            **work.job,
            "processes": processes,
            "nodes": 1,
            "launch": "qat",
            "leads": True,
            "parent": os.getpid(),
            "folder": str(work.folder),
        }
        (work.folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "flows.worker", str(work.folder / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert events[-1]["event"] == "done", done.stderr
        assert ({"event": "group", "processes": 2} in events) == (processes == 2)
        lines = (work.out / HISTORY).read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
