"""Frontiers side by side: other backbones, other methods, other settings, on the same lines."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from crnn.errors import UserError
from flows import project, report
from flows.experiment import load_experiment
from flows.listing import folder_of, rows_of
from flows.rows import Row


def compare(names: Sequence[str], different_data: bool = False) -> tuple[list[Row], Path]:
    """Put the points of several finished sweeps into one table and plot.

    Args:
        names: Each a params file or the name of an experiment, whose newest sweep is taken, or
            EXPERIMENT/SWEEP as the folder of reports has them.
        different_data: Allow sweeps whose samples are not the same.

    Returns:
        All rows, named after their sweep and point, and the folder of the report.

    Raises:
        UserError: A sweep that does not exist, one given twice, or other samples.
    """
    sweeps = {_title(path): rows_of(path) for path in (_folder(name) for name in names)}
    if len(sweeps) < max(2, len(names)):
        raise UserError(f"compare takes two or more different sweeps, not {', '.join(names)}")
    if not different_data:
        _refuse_different_data(sweeps)
    rows = [
        {**row, "point": f"{title} {row['point']}", "frontier": title}
        for title, frontier in sweeps.items()
        for row in frontier
    ]
    for row, best in zip(rows, report.pareto(rows), strict=True):
        row["pareto"] = best
    key = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    folder = project.reports_folder() / "compared" / key
    report.write_report(folder, ", ".join(sweeps), rows)
    return rows, folder


def _folder(name: str) -> Path:
    """Folder of the sweep that is meant."""
    if name.endswith((".yaml", ".yml")):
        name = load_experiment(Path(name)).name
    return folder_of(name)


def _title(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name.removeprefix('sweep-')[:4]}"


def _refuse_different_data(sweeps: dict[str, list[Row]]) -> None:
    """Raise a UserError where not all accuracies are of the same lines."""
    data = {title: rows[0]["stages"]["data"] for title, rows in sweeps.items()}
    first = next(iter(data))
    others = [title for title, key in data.items() if key != data[first]]
    if others:
        raise UserError(
            f"{', '.join(others)} read other samples than {first}, or read them otherwise (charset,"
            " max_width, on_bad_sample), so that their accuracies do not compare;"
            " --different-data shows them side by side all the same"
        )
