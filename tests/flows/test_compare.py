"""Frontiers side by side."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from crnn.errors import UserError
from flows import project
from flows.compare import compare
from flows.comparison import comparisons, remarks
from flows.listing import folder_of, sweeps
from flows.report import axes_of, subject, table_cells
from tests.flows.conftest import TINY
from tests.flows.test_report import row


def sweep(name: str, key: str, cost: float, data: str = "data-1", age: float = 0) -> None:
    """A finished sweep of two points in the folder of reports."""
    folder = project.reports_folder() / name / f"sweep-{key}"
    folder.mkdir(parents=True)
    rows = [row("baseline", 0.9, 10 * cost), row("0.5", 0.8, cost)]
    for each in rows:
        each["stages"] = {"data": data}
    (folder / "frontier.json").write_text(json.dumps(rows))
    os.utime(folder, (1e9 - age, 1e9 - age))


def test_points_of_all_sweeps_are_on_one_pareto_set(tmp_path: Path) -> None:
    sweep("tiny", "aaaa11", 3.0)
    sweep("other", "bbbb22", 2.0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    rows, folder = compare([str(tmp_path / "tiny.yaml"), "other"])
    assert {r["point"]: r["pareto"] for r in rows} == {
        "tiny/aaaa baseline": False,
        "tiny/aaaa 0.5": False,
        "other/bbbb baseline": True,
        "other/bbbb 0.5": True,
    }
    assert {path.suffix for path in folder.iterdir()} == {".csv", ".md", ".json", ".png", ".html"}
    assert "other/bbbb 0.5" in (folder / "frontier.md").read_text()


def test_controls_are_compared_within_each_sweep() -> None:
    for name, key in (("tiny", "aaaa11"), ("other", "bbbb22")):
        sweep(name, key, 3.0)
        (path,) = (project.reports_folder() / name).glob("*/frontier.json")
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([*rows, {**rows[1], "point": "small 0.5", "control": "small"}]))
    said = comparisons(compare(["tiny", "other"])[0])
    assert [line.split(":")[0] for line in said] == ["tiny/aaaa 0.5", "other/bbbb 0.5"]
    assert all("slimming is level with it" in line for line in said)


def test_sweeps_with_and_without_exports_compare_by_what_both_have() -> None:
    sweep("tiny", "aaaa11", 3.0)
    sweep("other", "bbbb22", 2.0)
    for name, missing in (("tiny", "cost/latency_ms"), ("other", "cost/onnx_latency_ms")):
        (path,) = (project.reports_folder() / name).glob("*/frontier.json")
        rows = [{n: v for n, v in r.items() if n != missing} for r in json.loads(path.read_text())]
        path.write_text(json.dumps(rows))
    rows, folder = compare(["tiny", "other"])
    shared = {"cost/params_total", "cost/bytes", "cost/macs"}
    assert set(axes_of(rows)) == shared
    assert (folder / "frontier.png").stat().st_size > 10_000


def test_latencies_of_two_machines_are_not_taken_for_comparable() -> None:
    sweep("tiny", "aaaa11", 3.0)
    sweep("other", "bbbb22", 2.0)
    rows, folder = compare(["tiny", "other"])
    assert remarks(rows) == ["Timed on a CPU."]
    (path,) = (project.reports_folder() / "other").glob("*/frontier.json")
    path.write_text(path.read_text().replace("a CPU", "another CPU"))
    rows, folder = compare(["tiny", "other"])
    warning = "The latencies do not compare, they are of different places: a CPU; another CPU."
    assert remarks(rows) == [warning]
    for name in ("frontier.md", "report.html"):
        assert warning in (folder / name).read_text()


def test_the_newest_sweep_is_meant_unless_one_is_named() -> None:
    sweep("tiny", "aaaa11", 3.0, age=100)
    sweep("tiny", "cccc33", 2.0)
    sweep("other", "bbbb22", 2.0, age=50)
    assert compare(["tiny", "other"])[0][0]["frontier"] == "tiny/cccc"
    rows, folder = compare(["tiny/sweep-aaaa11", "tiny"])
    assert rows[0]["frontier"] == "tiny/aaaa"
    assert [sweep["sweep"] for sweep in sweeps()] == [
        "sweep-cccc33",
        "sweep-bbbb22",
        "sweep-aaaa11",
    ]
    assert folder_of(folder.name) == folder
    sweep("compared", "dddd44", 2.0, age=1e8)
    assert folder_of("compared").name == "sweep-dddd44", "comparisons are no sweeps of it"


def test_a_damaged_sweep_is_named_with_what_to_do() -> None:
    sweep("tiny", "aaaa11", 3.0)
    damaged = project.reports_folder() / "tiny" / "sweep-aaaa11" / "frontier.json"
    damaged.write_text("{")
    with pytest.raises(
        UserError, match=rf"{re.escape(str(damaged))} cannot be read .*; remove its"
    ):
        sweeps()


def test_other_samples_are_refused_unless_asked_for() -> None:
    sweep("tiny", "aaaa11", 3.0)
    sweep("other", "bbbb22", 2.0, data="data-2")
    with pytest.raises(UserError, match="other/bbbb read other samples than tiny/aaaa"):
        compare(["tiny", "other"])
    rows, _ = compare(["tiny", "other"], different_data=True)
    assert len(rows) == 4
    rows[3]["val/samples"] = 20.0
    assert subject("both", rows) == "both: 100 or 20 val lines"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tiny"], "two or more different"),
        (["tiny", "tiny"], "two or more different"),
        (["tiny", "nothing"], "no sweep of nothing"),
        (["tiny", "/nowhere/nothing"], "no sweep of /nowhere/nothing"),
        (["tiny", ""], "no sweep of "),
        (["tiny", "absent.yaml"], "cannot read params file"),
    ],
)
def test_what_cannot_be_compared_is_said(names: list[str], message: str) -> None:
    sweep("tiny", "aaaa11", 3.0)
    with pytest.raises(UserError, match=message):
        compare(names)


def test_what_one_row_alone_has_is_a_column_of_all() -> None:
    wished = {"target/requested": 40_000, "target/achieved": 39_876.0}
    rows = [row("0.5", 0.9, 1.0), {**row("params 40,000", 0.9, 1.0), **wished}]
    rows.append(
        {**row("0.6", 0.9, 1.0), "val/word_accuracy_std": 0.012, "seeds": {"0": {}, "1": {}}}
    )
    header, cells = table_cells(rows)
    assert all(len(line) == len(header) for line in cells)
    assert [line[header.index("asked / got")] for line in cells] == ["-", "40,000 / 39,876", "-"]
    assert [line[header.index("SD of seeds")] for line in cells] == ["-", "-", "1.20"]
    assert subject("title", rows).endswith("val lines, means of 1 or 2 seeds")


def test_the_deployed_latency_is_shown_where_there_is_one() -> None:
    rows = [{**row("0.5", 0.9, 1.0), "cost/latency_deployed_ms": 1.25}, row("0.6", 0.9, 1.0)]
    header, cells = table_cells(rows)
    assert [line[header.index("deployed")] for line in cells] == ["1.25 ms", "-"]
    assert "deployed" not in table_cells(rows[1:])[0]
