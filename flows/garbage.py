"""What the state folder holds that nobody refers to any more."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Any

from crnn.errors import UserError
from flows import cache, project
from flows.listing import ROWS
from flows.locks import FLOW, held_since, is_free, unless_held

DAY = 86_400

GONE = ".removed"

OURS = re.compile(r"\.?[a-z0-9_]+-[0-9a-f]{20}|fetched-\d+-\d+|joined$")
"""Beginnings of the names of our folders: a state folder may be anybody's, put there by mistake."""


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
    and always while it is computed, as is what has been used since the oldest running pipeline
    began: no sweep refers to it yet.

    Args:
        days: How long a folder must have been left alone.
        deleted_sweeps: Keys of sweeps whose MLflow run was deleted.
        registered: Keys of the stages behind models in MLflow's registry.

    Raises:
        UserError: The report of a sweep is unreadable, so that nobody knows what it refers to.
    """
    since = _oldest_use(days)  # First: a pipeline that ends now has written its report below.
    reports = {path.name: path for path in project.reports_folder().glob("*/sweep-*")}
    gone = {key: path for key, path in reports.items() if key in deleted_sweeps}
    wanted = set().union(*(_stages_of(p) for k, p in reports.items() if k not in gone))
    work = _folders(project.work_folder())
    unfinished = [path for path in work if _used(path) > since or not is_free(path.name)]
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
        if path.name not in kept and _used(path) <= since and is_free(path.name)
    ]


def remove(items: list[Garbage], days: float) -> list[Garbage]:
    """Delete the folders that are still unused.

    Args:
        items: What was found to be garbage.
        days: How long a folder must have been left alone.

    Returns:
        Those that are gone.

    Raises:
        OSError: One cannot be deleted; those before it are gone.
    """
    return [item for item in items if _removed(item.path, days)]


def _removed(folder: Path, days: float) -> bool:
    with unless_held(folder.name) as free:
        # A pipeline may have begun to use it while those before it went.
        if not free or not folder.is_dir() or _used(folder) > _oldest_use(days):
            return False
        # Renamed first: a removal that is killed leaves no half of a stage behind.
        doomed = folder.with_name(f".{folder.name.removeprefix('.').removesuffix(GONE)}{GONE}")
        folder.rename(doomed)
    shutil.rmtree(doomed)
    return True


def _folders(parent: Path) -> list[Path]:
    folders = (path for path in parent.glob("*") if path.is_dir() and not path.is_symlink())
    return sorted(path for path in folders if OURS.match(path.name))


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


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of the folder and its files; what a pipeline takes away meanwhile is passed over."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    for path in chain([folder], files):
        with suppress(FileNotFoundError):
            yield path.stat()


def _size(folder: Path) -> int:
    return sum(stat.st_size for stat in _stats(folder) if S_ISREG(stat.st_mode))


def _used(folder: Path) -> float:
    """When it was last written to or taken from the cache, seconds; now if it has just gone."""
    return max((stat.st_mtime for stat in _stats(folder)), default=time.time())


def _oldest_use(days: float) -> float:
    """What was used later than this stays, seconds."""
    return min([time.time() - days * DAY, *held_since(f"{FLOW}*")])
