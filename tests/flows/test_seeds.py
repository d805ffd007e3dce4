"""Several seeds: the whole chain once for each, on the same data, and a mean."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from crnn.metrics import interval_of_seeds, wilson_interval
from flows.definitions import TRAINING
from flows.report import table_cells
from flows.rows import mean_of_seeds
from tests.flows.conftest import Project, computed, copy_of, points_of, runs_of, work_of
from tests.flows.test_report import row

Finished = tuple[Project, dict[str, Any]]


def row_of_seed(seed: int, accuracy: float, cost: float) -> dict[str, Any]:
    stages = {"data": "data-1", "finetune": f"finetune-{seed}"}
    return {**row("0.62", accuracy, cost), "checkpoint": f"model-{seed}", "stages": stages}


def test_each_kind_of_stage_draws_its_own_order_and_augmentation(
    finished: Finished, tmp_path: Path
) -> None:
    """Else fine-tuning saw the baseline's images again, and 8 bits were judged by learnt ones."""
    seeds = {
        (stage, seed): work_of(finished[0], stage, {}, tmp_path / f"{stage}-{seed}", seed=seed).seed
        for stage in (*TRAINING, "int8")
        for seed in (0, 1)
    }
    assert len(set(seeds.values())) == len(seeds)


def test_a_row_of_several_seeds_has_means_and_spread() -> None:
    accuracies, costs = [0.8, 0.9, 0.85], [10.0, 12.0, 17.0]
    rows = {s: row_of_seed(s, a, c) for s, a, c in zip((4, 2, 7), accuracies, costs, strict=True)}
    mean = mean_of_seeds(rows)
    assert mean["val/word_accuracy"] == pytest.approx(np.mean(accuracies))
    assert mean["val/word_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert mean["cost/macs"] == pytest.approx(np.mean(costs))
    assert (mean["val/word_accuracy_seed_2"], mean["seeds"]["2"]["cost/macs"]) == (0.9, 12.0)
    assert mean["checkpoint"] == "model-4"
    assert mean["stages"] == {
        "data": "data-1",
        "finetune_seed_4": "finetune-4",
        "finetune_seed_2": "finetune-2",
        "finetune_seed_7": "finetune-7",
    }
    assert mean["val/samples"] == 100
    assert mean["timed_on"] == "a CPU"
    rows[2]["timed_on"] = "another CPU"
    assert mean_of_seeds(rows)["timed_on"] == "a CPU; another CPU"
    header, (cells,) = table_cells([{**mean, "pareto": True}])
    assert dict(zip(header, cells, strict=True))["SD of seeds"] == "5.00"


def test_a_single_seed_changes_nothing() -> None:
    only = row_of_seed(0, 0.8, 10)
    assert mean_of_seeds({0: only}) is only
    assert "SD of seeds" not in table_cells([only])[0]


def test_more_seeds_are_not_more_lines_and_their_spread_widens_the_interval() -> None:
    assert interval_of_seeds([0.8, 0.8, 0.8], 100) == wilson_interval(0.8, 100)
    # p (1 - p) / lines = 0.0025 = std^2 / seeds: as much from the seeds as from 100 lines.
    # Of two seeds one degree of freedom, and 1 x (0.005 / 0.0025)^2 of the sum.
    widened = wilson_interval(0.5, 50, t.ppf(0.975, 4))
    assert interval_of_seeds([0.45, 0.55], 100) == pytest.approx(widened)
    assert widened[0] < wilson_interval(0.5, 50)[0]
    assert interval_of_seeds([1.0, 1.0], 100) == wilson_interval(1.0, 100)
    assert interval_of_seeds([0.0, 1.0], 100)[0] < 0.1


BOTH = ["--ratios", "0.6", "--set", "prune.targets.params=40000", "--set", "seeds=[0,1]"]


@pytest.fixture(scope="session")
def seeded(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny frontier, gone on with to a second seed, and what that printed."""
    return computed(tmp_path_factory, "seeded", partial(copy_of, finished), *BOTH)


def test_one_seed_in_a_list_has_the_keys_and_rows_of_that_seed_alone(finished: Finished) -> None:
    listed = finished[0].frontier("--set", "seeds=[0]")
    assert (listed["rows"], listed["computed"]) == (finished[1]["rows"], [])


def test_another_seed_runs_all_that_trains_on_the_same_data(seeded: Finished) -> None:
    project, result = seeded
    point, computed = "target params 40,000", set(result["computed"])
    trained = ["baseline", "sparse", point, "prune 0.6", "finetune 0.6", "measure finetune 0.6"]
    trained.append("latency")
    assert {f"{label} seed 1" for label in trained} <= computed
    assert "data" not in computed
    assert {label for label in computed if "0.6 seed 0" in label} == set(), "it was there before"
    shown = project.run("frontier", str(project.params), *BOTH).stdout
    assert "everything was cached" in shown
    assert "16 val lines, means of 2 seeds" in shown


def test_a_row_is_the_mean_of_what_each_seed_gives_alone(
    finished: Finished, seeded: Finished
) -> None:
    project, result = seeded
    alone = project.frontier("--ratios", "0.6", "--set", "seeds=[1]")
    assert alone["computed"] == ["latency"]
    of_seed_0 = {row["point"]: row for row in finished[1]["rows"]}
    assert [row["point"] for row in result["rows"]] == ["baseline", "0.6", "params 40,000"]
    for mean, other in zip(result["rows"], alone["rows"], strict=False):
        own = [of_seed_0[mean["point"]], other]
        assert mean["checkpoint"] == own[0]["checkpoint"]
        for figure in ("val/word_accuracy", "val/ned", "cost/params_total", "cost/macs"):
            assert mean[figure] == pytest.approx(np.mean([row[figure] for row in own]))
            assert [mean["seeds"][seed][figure] for seed in "01"] == [row[figure] for row in own]
        assert mean["cost/latency_ms"] == np.mean(
            [mean["seeds"][seed]["cost/latency_ms"] for seed in "01"]
        )
        keys = {key for row in own for key in row["stages"].values()}
        # Networks are timed side by side with those of the same sweep.
        assert {key for key in keys ^ set(mean["stages"].values()) if "latency" not in key} == set()
    wished = result["rows"][2]
    assert all(seed["cost/params_total"] <= 40_000 for seed in wished["seeds"].values())


def test_points_of_several_seeds_lead_to_the_stages_of_all(seeded: Finished) -> None:
    project, result = seeded
    assert "\n0 folders" in "\n" + project.run("gc", "--older-than", "0").stdout
    point, stages = points_of(project, result["sweep_run"])["0.6"].data, runs_of(project, "stage")
    assert point.tags["finetune_seed_0_run"] == stages["finetune 0.6"].info.run_id
    assert point.tags["finetune_seed_1_run"] == stages["finetune 0.6 seed 1"].info.run_id
    assert point.tags["data_run"] == stages["data"].info.run_id
    assert point.metrics["val/word_accuracy_std"] == result["rows"][1]["val/word_accuracy_std"]
    assert project.run("preview", str(project.params), "--set", "seeds=[1]").stdout
