from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.report import AXES, gamma_ridges, pareto, table_cells, write_report


def row(point: str, accuracy: float, cost: float) -> dict[str, Any]:
    return {
        "point": point,
        "prune/ratio_achieved": 0.5,
        "val/word_accuracy": accuracy,
        "val/word_accuracy_low": accuracy - 0.02,
        "val/word_accuracy_high": accuracy + 0.01,
        "val/ned": 0.9,
        "val/samples": 100.0,
        **dict.fromkeys(AXES, cost),
        "timed_on": "a CPU",
        "pareto": False,
        "stages": {},
    }


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(0.9, 10)], [True]),
        ([(0.9, 10), (0.8, 5)], [True, True]),
        ([(0.9, 10), (0.9, 5)], [False, True]),
        ([(0.8, 10), (0.9, 10)], [False, True]),
        ([(0.9, 10), (0.95, 5), (0.5, 1)], [False, True, True]),
        ([(0.9, 10), (0.9, 10)], [True, True]),
    ],
)
def test_the_pareto_set_of_known_points(
    points: list[tuple[float, float]], best: list[bool]
) -> None:
    assert pareto([row(str(i), *point) for i, point in enumerate(points)]) == best


def test_a_report_is_not_drawn_twice(tmp_path: Path) -> None:
    rows = [row("baseline", 0.9, 10), row("0.62", 0.89, 3)]
    write_report(tmp_path, "title", rows)
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    names = {f"frontier.{kind}" for kind in ("csv", "md", "json", "png")}
    assert set(first) == {*names, "report.html"}
    write_report(tmp_path, "title", rows)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == first
    (tmp_path / "report.html").unlink()
    write_report(tmp_path, "title", rows)
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in names if again[name] == first[name]} == names
    assert "report.html" in again, "what was deleted is drawn once more"
    write_report(tmp_path, "title", rows[:1])
    assert (tmp_path / "frontier.csv").read_text().count("\n") == 2


def test_the_table_says_what_a_person_needs() -> None:
    header, (cells,) = table_cells([row("0.62", 0.8912, 1.25e6)])
    shown = dict(zip(header, cells, strict=True))
    assert shown["word accuracy (95%)"] == "89.1% (87.1-90.1)"
    assert shown["params"] == "1.250 M"
    assert shown["unseen"] == "-"


def test_gamma_pictures_of_two_runs_have_the_same_axes() -> None:
    few, many = {"bn": np.array([0.0, 0.5])}, {"bn": np.array([0.2, 5.0])}
    one, other = gamma_ridges(few, "epoch 1"), gamma_ridges(many, "epoch 1")
    assert one.shape == other.shape
    assert one.dtype == np.uint8
    differing = np.argwhere((one != other).any(2))
    height = len(one)
    assert len(differing)
    assert differing[:, 0].min() > 0.05 * height, "the title and the axes stay"
    assert differing[:, 0].max() < 0.9 * height
