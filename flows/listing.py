"""What a state folder holds: finished sweeps, and stages under way."""

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crnn.errors import UserError
from flows import project
from flows.cache import finished_epochs
from flows.locks import is_free
from flows.rows import ACCURACY, Row

ROWS = "frontier.json"


def sweeps() -> list[dict[str, Any]]:
    """Finished sweeps, the newest first: experiment, sweep, finished, points and accuracies."""
    folders = project.reports_folder().glob(f"*/sweep-*/{ROWS}")
    newest = sorted(folders, key=_asked_for, reverse=True)
    return [_sweep(path) for path in newest]


def _asked_for(path: Path) -> float:
    """When a sweep was computed or asked for last, by its file of rows."""
    return path.parent.stat().st_mtime


def _sweep(path: Path) -> dict[str, Any]:
    rows = rows_of(path.parent)
    return {
        "experiment": path.parents[1].name,
        "sweep": path.parent.name,
        "finished": _when(path),
        "points": {row["point"]: row[ACCURACY] for row in rows},
        "smallest": min(row["cost/bytes"] for row in rows),
        "report": str(path.parent),
    }


def stages_under_way() -> Iterator[dict[str, Any]]:
    """Stages that are being computed, or that were stopped and go on with the next run."""
    for path in sorted(project.work_folder().glob("*/job.json")):
        with suppress(OSError, ValueError):  # It ends, or begins, in this instant.
            yield _stage_under_way(path)


def _stage_under_way(path: Path) -> dict[str, Any]:
    job = json.loads(path.read_text(encoding="utf-8"))
    return {
        "stage": job.get("label", job["stage"]),
        "key": path.parent.name,
        "state": "stopped" if is_free(path.parent.name) else "running",
        "epochs": finished_epochs(path.parent / "out"),
        "of": job["settings"].get("train", {}).get("epochs"),
        "since": _when(path),
    }


def _when(path: Path) -> str:
    """Time of a file, local, to the minute."""
    moment = datetime.fromtimestamp(path.stat().st_mtime, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M")


def folder_of(name: str) -> Path:
    """Folder of the sweep that is meant.

    Args:
        name: An experiment, whose newest sweep is taken, EXPERIMENT/SWEEP, or a sweep.

    Raises:
        UserError: There is none.
    """
    reports = project.reports_folder()
    if (reports / name / ROWS).is_file():
        return reports / name
    # Comparisons lie beside the experiments, and have a name of their own alone.
    found = [
        path
        for path in reports.glob(f"*/*/{ROWS}")
        if name == path.parent.name
        or (name == path.parents[1].name and path.parent.name.startswith("sweep-"))
    ]
    if not found:
        raise UserError(f"no sweep of {name} in {reports}; `crnn-slim runs` lists those there are")
    return max(found, key=_asked_for).parent


def rows_of(folder: Path) -> list[Row]:
    """Rows of a finished sweep.

    Raises:
        UserError: They cannot be read.
    """
    try:
        rows: list[Row] = json.loads((folder / ROWS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / ROWS} cannot be read ({error}); remove its folder, and the command of that"
            " sweep writes it again"
        ) from error
    return rows
