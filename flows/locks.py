"""Locks between processes: one computation of a stage at a time, and no more of them than cores.

The locks are the kernel's (flock), so they end with their holders whatever kills them. Local disks
only.
"""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from crnn.errors import StoppedError, Stopping, never
from flows import project

POLL_SECONDS = 0.25

FLOW = "flow-"
"""Before the run's id in the name of the lock that a pipeline holds while it runs."""

Log = Callable[[str], None]


@contextmanager
def single_flight(key: str, stopping: Stopping = never, log: Log = lambda _: None) -> Iterator[int]:
    """Hold the key's lock; while another process holds it, wait and say for whom.

    The child that computes is given the descriptor and holds it too: the work folder never has
    two writers.

    Yields:
        Descriptor of the locked file.
    """
    with _one_of([key], stopping, lambda holder: log(f"{key}: waiting for {holder}")) as held:
        yield held.descriptor


@contextmanager
def seats(count: int, cores: Sequence[int], stopping: Stopping, log: Log) -> Iterator[None]:
    """Hold `count` of these cores, over all pipelines of this state folder.

    Two trainings that share cores run at a tenth of their speed each, because their threads wait
    for each other; one after the other they run at full speed. The cores are taken in blocks of
    `count`, each block in ascending order, so that two that wait never wait for each other.
    Pipelines that were given cores of their own (`taskset`) do not wait for each other.
    """

    def say(holder: str) -> None:
        if holder != _self():  # Its own stages wait for each other as a matter of course.
            log(f"waiting for a free core; {holder} computes")

    starts = range(0, len(cores) - count + 1, count)
    blocks = [cores[first : first + count] for first in starts]
    with ExitStack() as held:
        taken = held.enter_context(_one_of([_seat(block[0]) for block in blocks], stopping, say))
        block = next(block for block in blocks if _seat(block[0]) == taken.name)
        for core in block[1:]:
            held.enter_context(_one_of([_seat(core)], stopping, say))
        yield


def _seat(core: int) -> str:
    return f"seat-{core}"


@dataclass(frozen=True)
class _Held:
    """A lock that this process holds."""

    name: str
    descriptor: int


def is_free(key: str) -> bool:
    """Whether no process holds the key's lock at this instant."""
    with unless_held(key) as free:
        return free


@contextmanager
def unless_held(key: str) -> Iterator[bool]:
    """Hold the key's lock where that can be had at once; yields whether it could."""
    descriptor = _open(key)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def held_since(pattern: str) -> list[float]:
    """When the holders of the locks with such names took them, seconds."""
    found = []
    for path in project.locks_folder().glob(f"{pattern}.lock"):
        with suppress(FileNotFoundError):  # It was let go in this instant.
            taken = path.stat().st_mtime
            if not is_free(path.stem):
                found.append(taken)
    return found


@contextmanager
def _one_of(names: Sequence[str], stopping: Stopping, say: Log) -> Iterator[_Held]:
    """Hold the first of these locks that comes free."""
    locks = [_Held(name, _open(name)) for name in names]
    try:
        told = False
        while (taken := next((lock for lock in locks if _try_lock(lock.descriptor)), None)) is None:
            if not told and (holder := _holder(locks[0].descriptor)):
                say(holder)
                told = True
            if stopping():
                raise StoppedError(f"stopped while waiting for {names[0]}")
            time.sleep(POLL_SECONDS)
        os.ftruncate(taken.descriptor, 0)
        os.pwrite(taken.descriptor, _self().encode(), 0)
        yield taken
    finally:
        for lock in locks:
            os.close(lock.descriptor)


def _self() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _open(name: str) -> int:
    path = project.locks_folder() / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    """Whoever holds the lock, as it wrote; nothing as long as it has not."""
    return os.pread(descriptor, 200, 0).decode(errors="replace")
