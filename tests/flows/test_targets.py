"""Ratios that are found from a wish for size or speed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crnn.errors import SettingsError
from flows.stages.cutting import uncut_at
from flows.stages.targets import COSTS, ratio_for
from pruning.settings import PruneSettings
from pruning.slimming import slim
from tests.flows.conftest import Project, copy_of

Finished = tuple[Project, dict[str, Any]]


@pytest.fixture(scope="session")
def index(finished: Finished) -> Path:
    """Result file of the finished sparse stage, whose snapshots are at every 5% of zeros."""
    project = finished[0]
    return project.home / "stages" / project.manifests()["sparse"]["key"] / "snapshots.json"


@pytest.mark.parametrize("kind", ["size_mb", "params", "macs"])
@pytest.mark.parametrize(
    ("share", "settings"),
    [
        (0.9, PruneSettings()),
        (0.4, PruneSettings()),
        (0.2, PruneSettings()),
        (0.4, PruneSettings(lstm_ratio=0.5, head_rank=3)),
    ],
)
def test_a_target_is_met_by_the_lowest_ratio_that_can(
    index: Path, kind: str, share: float, settings: PruneSettings
) -> None:
    _, uncut = ratio_for(index, kind, 1e12, settings)
    ratio, achieved = ratio_for(index, kind, share * uncut, settings)
    assert achieved == cost_at(index, kind, ratio, settings) <= share * uncut
    lower = [ratio - step for step in (0.0001, 0.01, 0.05, 0.1) if step <= ratio]
    assert all(cost_at(index, kind, round(r, 4), settings) > share * uncut for r in lower)


def cost_at(index: Path, kind: str, ratio: float, settings: PruneSettings) -> float:
    uncut = uncut_at(index, ratio)
    return COSTS[kind](replace(uncut, model=slim(uncut.model, ratio, settings), stage="finetune"))


def test_a_target_out_of_reach_is_refused_with_the_nearest(index: Path) -> None:
    settings = PruneSettings(min_ratio=0.5)
    rule = r"prune.targets.params 10 is out of reach; the nearest is [\d,]+, at ratio 0.4"
    with pytest.raises(SettingsError, match=rule):
        ratio_for(index, "params", 10, settings)


def test_each_target_is_a_point_of_the_frontier(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    wishes = ["--set", "ratios=[]", "--set", "prune.targets={params: 40000, latency_ms: 1000}"]
    result = project.frontier(*wishes)
    uncut, small, fast = result["rows"]
    assert (small["point"], fast["point"]) == ("params 40,000", "latency_ms 1,000")
    assert small["target/requested"] == 40_000
    assert small["target/achieved"] == small["cost/params_total"] <= 40_000
    assert fast["cost/params_total"] == uncut["cost/params_total"], "slow is fast enough"
    assert small["prune/ratio_requested"] == small["target/ratio"]
    assert "target params 40,000" in result["computed"]
    assert project.frontier(*wishes)["computed"] == []
    cuts = json.loads(project.run("preview", str(project.params), *wishes, "--json").stdout)
    assert [cut["params"] for cut in cuts] == [
        small["cost/params_total"],
        fast["cost/params_total"],
    ]
    refused = project.run(
        "frontier", str(project.params), "--set", "prune.targets.params=10", code=2
    )
    assert "prune.targets.params 10 is out of reach" in refused.stderr
    nothing = project.run("frontier", str(project.params), "--set", "ratios=[]", code=2)
    assert "give ratios, prune.targets, or both" in nothing.stderr
