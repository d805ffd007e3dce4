"""Exports as stages: behind every point, measured, and read with."""

import json
from pathlib import Path
from typing import Any

import torch

from crnn.data.render import render_line
from crnn.reading import load_exported
from tests.conftest import DIGITS
from tests.flows.conftest import Project, copy_of, points_of

Finished = tuple[Project, dict[str, Any]]


def test_every_point_is_exported_measured_and_reads_the_same(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    exporting = ("--set", "export={pt2: true}", "--set", "quantize=null", "--set", "champion=null")
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
            project.run("predict", str(project.home / row[kind]), str(image), "--json").stdout
        )
        for kind in ("checkpoint", "onnx")
    ]
    one, other = (r["readings"][0] for r in readings)
    assert one["text"] == other["text"]
    assert abs(one["confidence"] - other["confidence"]) < 1e-4
    assert project.frontier(*exporting)["computed"] == []
