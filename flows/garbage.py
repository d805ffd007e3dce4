"""What the state folder holds that nobody refers to any more."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crnn.errors import UserError
from flows import cache, project
from flows.listing import ROWS
from flows.locks import is_free

DAY = 86_400


@dataclass(frozen=True)
class Garbage:
    """A folder that may go.

    Attributes:
        path: The folder.
        size: Bytes of its files.
        reason: Why it may go.
    """

    path: Path
    size: int
    reason: str


def garbage(days: float, deleted_sweeps: set[str], registered: set[str]) -> list[Garbage]:
    """Folders that no sweep or model refers to and nothing has written to for some days.

    A sweep refers to the stages of its points and to all that is upstream of them; it is gone
    once its MLflow run has been deleted. What an unfinished stage starts from is kept with it,
    and always while it is computed.

    Args:
        days: How long a folder must have been left alone.
        deleted_sweeps: Keys of sweeps whose MLflow run was deleted.
        registered: Keys of the stages behind models in MLflow's registry.

    Raises:
        UserError: The report of a sweep is unreadable, so that nobody knows what it refers to.
    """
    reports = {path.name: path for path in project.reports_folder().glob("*/sweep-*")}
    gone = {key: path for key, path in reports.items() if key in deleted_sweeps}
    wanted = set().union(*(_stages_of(p) for k, p in reports.items() if k not in gone))
    work = _folders(project.work_folder())
    unfinished = [path for path in work if _is_recent(path, days) or not is_free(path.name)]
    kept = _with_upstream(wanted.union(registered, *map(_inputs_of_work, unfinished)))
    found = [
        *((path, "its sweep was deleted in MLflow") for path in gone.values()),
        *((p, "no sweep or model refers to it") for p in _folders(project.stages_folder())),
        *((p, "was never finished") for p in work),
        *((p, "could not be used and was set aside") for p in _folders(project.set_aside_folder())),
    ]
    return [
        Garbage(path, _size(path), reason)
        for path, reason in found
        if path.name not in kept and not _is_recent(path, days) and is_free(path.name)
    ]


def remove(items: list[Garbage]) -> None:
    """Delete the folders; OSError where one cannot be, those before it are gone."""
    for item in items:
        # Renamed first: a removal that is killed leaves no half of a stage behind.
        doomed = item.path.with_name(f".{item.path.name}.removed")
        item.path.rename(doomed)
        shutil.rmtree(doomed)


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())


def _stages_of(report: Path) -> set[str]:
    """Keys of the stages behind a sweep's points."""
    rows = _json(report / ROWS)
    if rows is None:
        raise UserError(
            f"{report / ROWS} is unreadable, and says which stages must stay; run its"
            " frontier again, or remove the folder if it may go"
        )
    return {key for row in rows for key in row["stages"].values()}


def _inputs_of_work(folder: Path) -> set[str]:
    """Keys of the stages that an unfinished stage reads."""
    job = _json(folder / "job.json") or {"inputs": {}}
    return {Path(upstream["file"]).parent.name for upstream in job["inputs"].values()}


def _with_upstream(keys: set[str]) -> set[str]:
    """The keys, and those of all stages they were made from."""
    known: set[str] = set()
    todo = set(keys)
    while todo:
        key = todo.pop()
        known.add(key)
        manifest = _json(project.stages_folder() / key / cache.MANIFEST) or {"inputs": {}}
        todo |= set(manifest["inputs"].values()) - known
    return known


def _json(path: Path) -> Any:
    """Content of a JSON file; None where there is none to read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _is_recent(folder: Path, days: float) -> bool:
    newest = max(path.stat().st_mtime for path in [folder, *_files(folder)])
    return time.time() - newest < days * DAY
