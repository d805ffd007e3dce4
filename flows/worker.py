"""The process that computes one stage: `python -m flows.worker JOB.json`, started by children.py.

Progress goes to standard output as one JSON object a line; everything a library prints goes to
standard error. Where a stage is to train on several processes, this one launches them (group.py),
with the same command; the first of them reports and writes.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from crnn.errors import PassingError, UserError
from flows import group
from flows.children import TICK_SECONDS, end_with_parent

if TYPE_CHECKING:
    from flows.stages.work import Outcome, Work

Emit = Callable[[dict[str, Any]], None]


def main() -> None:
    """Compute the stage of the job file and report its outcome."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    launcher = os.environ.get(group.LAUNCHER)
    launched = launcher is not None
    if launched:
        _die_with_parent()
    end_with_parent(int(launcher or job["parent"]))
    if job["processes"] * job["nodes"] > 1 and not launched:
        with _refusals(job, _emitter(sys.stdout)):
            group.launch(job, sys.argv[1])
        return
    os.register_at_fork(after_in_child=_die_with_parent)
    emit = _emitter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    with _refusals(job, emit):
        if launched:
            _compute_together(job, emit)
        else:
            emit({"event": "done", **_compute(job, emit, Path(job["folder"]))})


@contextmanager
def _refusals(job: dict[str, Any], emit: Emit) -> Iterator[None]:
    """Inside, what is the user's to mend is reported as a sentence."""
    try:
        yield
    except UserError as error:
        emit({"event": "refused", "kind": type(error).__name__, "message": str(error)})
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message = (
            f"{error.strerror or error}{where} in stage {job['stage']}; finished epochs are kept"
        )
        emit({"event": "refused", "kind": PassingError.__name__, "message": message})
        raise


def _compute_together(job: dict[str, Any], emit: Emit) -> None:
    """Run the stage as one of several processes; the first one of each machine reports."""
    from crnn import distributed

    if os.environ["LOCAL_RANK"] != "0":
        emit = _silent
    with distributed.group(job["leads"]):
        emit({"event": "group", "processes": distributed.processes()})
        job, folder = group.share(job, distributed.rank(), distributed.from_first)
        outcome = _compute(job, emit, folder)
    emit({"event": "done", **outcome})


def _silent(event: dict[str, Any]) -> None:
    """Send nothing."""


def _compute(job: dict[str, Any], emit: Emit, folder: Path) -> dict[str, Any]:
    """Run the stage that the job names, in its work folder."""
    from crnn.distributed import rank
    from flows.stages.work import Work, run_timed

    work = Work(job, folder, folder / "out", emit)
    work.out.mkdir(exist_ok=True)
    for left_over in work.out.rglob(".*.tmp"):  # Of an attempt that was killed while it wrote.
        left_over.unlink()
    before = 0.0 if rank() else work.seconds_before()
    return run_timed(work, stages()[job["stage"]], before)


def stages() -> "dict[str, Callable[[Work], Outcome]]":
    """What computes each kind of stage. Not imported with this file: torch takes a second."""
    from flows.stages.controls import scratch, small
    from flows.stages.cutting import measure, prune
    from flows.stages.data import data
    from flows.stages.export import export, judge
    from flows.stages.latency import latency
    from flows.stages.quantize import int8, qat
    from flows.stages.sparse import sparse
    from flows.stages.targets import target
    from flows.stages.training import baseline, finetune

    return {
        "data": data,
        "baseline": baseline,
        "sparse": sparse,
        "target": target,
        "prune": prune,
        "finetune": finetune,
        "scratch": scratch,
        "small": small,
        "export": export,
        "judge": judge,
        "int8": int8,
        "qat": qat,
        "measure": measure,
        "latency": latency,
    }


def _emitter(stream: TextIO) -> Emit:
    """A function that sends an event; steps at most five times a second."""
    last = 0.0

    def emit(event: dict[str, Any]) -> None:
        nonlocal last
        if event["event"] == "step":
            if time.monotonic() - last < TICK_SECONDS and event["step"] < event["steps"]:
                return
            last = time.monotonic()
        print(json.dumps(event), file=stream, flush=True)

    return emit


def _die_with_parent() -> None:
    """In a process that the stage's own has started: end with it, at once where Linux allows it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
