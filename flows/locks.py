"""Locks between processes: one computation of a stage at a time, and no more of them than cores.

The locks are the kernel's (flock), so they end with their holders whatever kills them. Local disks
only.
"""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from crnn.errors import UserError
from flows import project

POLL_SECONDS = 0.25

Stopping = Callable[[], bool]
Log = Callable[[str], None]


@contextmanager
def single_flight(key: str, stopping: Stopping, log: Log) -> Iterator[int]:
    """Hold the key's lock; while another process holds it, wait and say for whom.

    The child that computes is given the descriptor and holds it too: the work folder never has
    two writers.

    Yields:
        Descriptor of the locked file.
    """
    with _one_of([key], stopping, lambda holder: log(f"{key}: waiting for {holder}")) as descriptor:
        yield descriptor


@contextmanager
def seats(count: int, total: int, stopping: Stopping, log: Log) -> Iterator[None]:
    """Hold `count` of the machine's `total` seats, over all pipelines of this state folder.

    Two trainings that share cores run at a tenth of their speed each, because their threads wait
    for each other; one after the other they run at full speed.
    """
    names = [f"seat-{number}" for number in range(total)]

    def say(holder: str) -> None:
        log(f"waiting for a free core; {holder} computes")

    with ExitStack() as held:
        if count == total:
            for name in names:  # In one order, so that two of these never wait for each other.
                held.enter_context(_one_of([name], stopping, say))
        else:
            for _ in range(count):
                held.enter_context(_one_of(names, stopping, say))
        yield


@contextmanager
def _one_of(names: Sequence[str], stopping: Stopping, say: Log) -> Iterator[int]:
    """Hold the first of these locks that comes free."""
    descriptors = [_open(name) for name in names]
    try:
        told = False
        while (taken := next((d for d in descriptors if _try_lock(d)), None)) is None:
            if not told:
                say(_holder(descriptors[0]))
                told = True
            if stopping():
                raise UserError(f"stopped while waiting for {names[0]}")
            time.sleep(POLL_SECONDS)
        os.ftruncate(taken, 0)
        os.pwrite(taken, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield taken
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


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
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
