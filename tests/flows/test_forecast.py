"""How far a sweep is, and how long it still takes."""

from pathlib import Path
from typing import Any

import pytest

from flows import forecast
from flows.cache import Manifest, Stage
from flows.experiment import load_experiment
from flows.forecast import Forecast, duration, forecast_of
from tests.flows.conftest import Project, copy_of, new_project

Finished = tuple[Project, dict[str, Any]]


def stage(name: str, label: str = "") -> Stage:
    return Stage(name, label or name, {}, {}, 1)


def finished(name: str, seconds: float, label: str = "") -> Manifest:
    return Manifest("key", name, label or name, "", {}, {}, {}, {}, None, seconds)


def step(step: int, steps: int) -> dict[str, Any]:
    return {"event": "step", "step": step, "steps": steps, "phase": f"epoch {step}/{steps}"}


def test_time_left_is_learned_from_what_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    sweep = Forecast({"data": 1, "baseline": 1, "finetune": 4}, 2, {})
    sweep.finish(finished("data", 5))
    sweep.step(stage("baseline"), step(1, 10))
    assert sweep.left() == (0, ["baseline", "finetune"])
    now[0] = 60
    sweep.step(stage("baseline"), step(3, 10))
    assert sweep.left() == (pytest.approx(210), ["finetune"]), "its own pace: 300 s, 30% done"
    assert sweep.sentence() == (
        "1 of 6 stages, at least 4 min left, no stage seen yet of: finetune"
    )
    assert sweep.report().splitlines()[1] == "- baseline: epoch 3/10, 30%, 4 min left"
    sweep.finish(finished("baseline", 300))
    sweep.finish(finished("finetune", 100, "finetune 0.62"))
    assert sweep.left() == (pytest.approx(150), []), "three are left, two at once"
    sweep.step(stage("finetune", "finetune 0.67"), step(1, 2))
    assert sweep.left() == (pytest.approx(125), [])
    sweep.interrupt(stage("finetune", "finetune 0.67"))
    for ratio in (0.67, 0.72, 0.77):
        sweep.finish(finished("finetune", 100, f"finetune {ratio}"))
    assert sweep.sentence() == "6 of 6 stages"
    sweep.add({"qat": 1, "finetune": 1})
    assert sweep.left() == (pytest.approx(100), ["qat"]), "the last one has no other beside it"
    assert sweep.stages == (6, 8)
    sweep.restart()
    assert sweep.stages == (0, 6), "tried again, it finds what has finished in the cache"


def test_the_data_stage_begins_anew_with_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    sweep = Forecast({"data": 1}, 1, {})
    sweep.step(stage("data"), step(1, 100))
    now[0] = 60
    sweep.step(stage("data"), step(100, 100))
    sweep.step(stage("data"), step(1, 10))
    now[0] = 61
    sweep.step(stage("data"), step(6, 10))
    assert sweep.left() == (pytest.approx(0.8), [])


@pytest.mark.parametrize("damage", ["", "[]", '{"seconds": 1}', "\xff"])
def test_a_damaged_stage_teaches_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
    for name in ("stages/*/manifest.json", "reports/tiny/*/frontier.json"):
        for path in project.home.glob(name):
            path.write_text(damage, encoding="latin-1")
        assert forecast_of(load_experiment(project.params), 1).before == {}


def test_time_left_is_learned_from_the_sweep_before() -> None:
    sweep = Forecast({"baseline": 1, "sparse": 1}, 1, {"baseline": [100, 200], "sparse": [50]})
    assert sweep.left() == (200, [])


def test_durations_are_said_as_people_do() -> None:
    said = [duration(seconds) for seconds in (0.2, 42, 100, 3600, 5000)]
    assert said == ["1 s", "42 s", "2 min", "1 h 0 min", "1 h 23 min"]


def test_what_is_planned_is_what_a_sweep_computes(
    finished: Finished, exported: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    for project, printed in (finished, exported):
        monkeypatch.setenv("CRNN_SLIM_HOME", str(project.home))
        sweep = forecast_of(load_experiment(project.params), 1)
        assert sum(sweep.planned.values()) == len(printed["computed"])
        assert set(sweep.before) == set(sweep.planned), "learned from the sweep before"


def test_the_plan_has_teachers_targets_controls_and_seeds(tmp_path: Path) -> None:
    controls = {"scratch": True, "small": True, "ratios": [0.3]}
    project = new_project(
        tmp_path,
        seeds=[0, 1],
        prune={"targets": {"size_mb": 0.1}},
        controls=controls,
        teacher={"epochs": 1},
    )
    planned = forecast_of(load_experiment(project.params), 1).planned
    assert planned == {
        "data": 1,
        "teacher": 2,
        "baseline": 2,
        "sparse": 2,
        "target": 2,
        "prune": 6,
        "finetune": 6,
        "scratch": 2,
        "small": 2,
        "measure": 12,
        "latency": 2,
    }
