"""Ratios that are found from a wish for size or speed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks.cuts import of_the_last
from crnn.checkpoint import load_checkpoint
from crnn.errors import SettingsError
from flows.stages.sparse import free_ratio, plan
from flows.stages.targets import ratio_for
from pruning.cost import COSTS, out_of_reach
from pruning.gammas import absolute_gammas
from pruning.readiness import live_removed
from pruning.settings import PruneSettings
from pruning.slimming import slim
from tests.flows.conftest import Project, copy_of

Finished = tuple[Project, dict[str, Any]]


@pytest.fixture(scope="session")
def index(finished: Finished) -> Path:
    """Result file of the finished sparse stage, whose snapshots are at every 2% of zeros."""
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
        (0.4, PruneSettings(round_to=8)),
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


@pytest.mark.parametrize(
    "settings", [PruneSettings(), PruneSettings(min_ratio=0.3), PruneSettings(round_to=4)]
)
def test_floors_and_rounding_count_in_what_is_free(index: Path, settings: PruneSettings) -> None:
    free = free_ratio(index, settings)
    assert free < 0.6 if settings.min_ratio else free > 0.6, "rounding cuts less than is asked for"
    for ratio, taken in ((free, False), (round(free + 1e-4, 4), True)):
        uncut, masks = plan(index, ratio, settings)
        assert (live_removed(absolute_gammas(uncut.model), masks) > 0) is taken


def test_a_cut_of_the_last_network_reads_as_it_and_all_of_its_channels_learn(index: Path) -> None:
    images = torch.randn(2, 3, 32, 64)
    last = load_checkpoint(index.parent / "model.safetensors").model
    model = of_the_last(index.parent, 0.3, PruneSettings())
    channels = sum(len(gamma) for gamma in absolute_gammas(last))
    kept = torch.cat(absolute_gammas(model))
    assert len(kept) == channels - int(0.3 * channels)
    assert (kept > 0).all()
    with torch.inference_mode():
        assert (model(images) - last(images)).abs().max() < 1e-4


def cost_at(index: Path, kind: str, ratio: float, settings: PruneSettings) -> float:
    uncut, masks = plan(index, ratio, settings)
    return COSTS[kind](replace(uncut, model=slim(uncut.model, masks, settings), stage="finetune"))


def test_up_to_the_target_a_cut_changes_nothing_and_starts_where_little_more_is_dead(
    index: Path,
) -> None:
    images = torch.randn(2, 3, 32, 64)
    there = [network["zeros"] for network in json.loads(index.read_text())["networks"]]
    starts = set()
    for ratio in (0.1, 0.3, 0.45, 0.6):
        uncut, masks = plan(index, ratio, PruneSettings())
        channels = sum(len(mask) for mask in masks)
        assert sum(int((~mask).sum()) for mask in masks) == int(channels * ratio)
        dead = sum(int((g == 0).sum()) for g in absolute_gammas(uncut.model))
        assert dead == min(zeros for zeros in there if zeros >= int(channels * ratio))
        starts.add(dead)
        with torch.inference_mode():
            compact = slim(uncut.model, masks, PruneSettings())
            assert (compact(images) - uncut.model(images)).abs().max() < 1e-4
    assert len(starts) == 4, "no point is a padded copy of another"


def test_rounded_widths_have_the_ratio_below_the_target_and_lose_nothing_up_to_it(
    index: Path,
) -> None:
    removed = {}
    for ratio in (0.3, 0.6):
        uncut, masks = plan(index, ratio, PruneSettings(round_to=4))
        assert live_removed(absolute_gammas(uncut.model), masks) == 0
        removed[ratio] = sum(int((~mask).sum()) for mask in masks)
    channels = sum(len(mask) for mask in masks)
    assert int(channels * 0.3) - 4 < removed[0.3] <= int(channels * 0.3)
    assert removed[0.3] < removed[0.6] <= int(channels * 0.6)


@given(low=st.integers(0, 9000), high=st.integers(0, 9000), round_to=st.sampled_from([1, 4, 8]))
@hypothesis_settings(max_examples=30, deadline=None)
def test_a_higher_ratio_keeps_a_subset(index: Path, low: int, high: int, round_to: int) -> None:
    settings = PruneSettings(round_to=round_to)
    low, high = sorted((low, high))
    assume(round_to == 1 or high <= 7000)  # Every layer keeps one block: these forbid more.
    more = plan(index, low / 10_000, settings)[1]
    fewer = plan(index, high / 10_000, settings)[1]
    assert all((a | ~b).all() for a, b in zip(more, fewer, strict=True))


def test_a_target_out_of_reach_is_refused_with_the_nearest(index: Path) -> None:
    half = PruneSettings(min_ratio=0.5)
    rule = r"prune.targets.params 10 is out of reach; the nearest is [\d,]+, at ratio 0.4"
    with pytest.raises(SettingsError, match=rule):
        ratio_for(index, "params", 10, half)


@pytest.mark.parametrize("nearest", [0.323004, 0.55942, 0.152108, 0.5, 12.0004])
def test_the_nearest_that_a_refusal_names_is_within_reach(nearest: float) -> None:
    text = str(out_of_reach("size_mb", 0.1, nearest, 0.9))
    named = float(re.findall(r"the nearest is ([\d.]+),", text)[0])
    assert nearest <= named < nearest + 0.001


def test_each_target_is_a_point_of_the_frontier(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    wishes = ["--set", "ratios=[]", "--set", "prune.targets={params: 40000, latency_ms: 1000}"]
    wishes += ["--set", "finetune.epochs=0"]
    result = project.frontier(*wishes)
    uncut, small, fast = result["rows"]
    assert (small["point"], fast["point"]) == ("params 40,000", "latency_ms 1,000")
    assert small["target/requested"] == 40_000
    assert small["target/achieved"] == small["cost/params_total"] <= 40_000
    assert fast["cost/params_total"] == uncut["cost/params_total"], "slow is fast enough"
    assert small["prune/ratio_requested"] == small["target/ratio"]
    assert "target params 40,000" in result["computed"]
    assert project.frontier(*wishes)["computed"] == []
    seen = json.loads(project.run("preview", str(project.params), *wishes, "--json").stdout)
    for cut, row in zip(seen["cuts"], (small, fast), strict=True):
        assert cut["params"] == row["cost/params_total"]
        for found in ("target/requested", "target/achieved", "target/ratio"):
            assert cut[found] == row[found], "what was found stays found, also a latency"
    table = project.run("preview", str(project.params), *wishes).stdout
    assert f"40,000 / {small['target/achieved']:,.0f}" in table
    refused = project.run(
        "frontier", str(project.params), "--set", "prune.targets.params=10", code=2
    )
    assert "prune.targets.params 10 is out of reach" in refused.stderr
