"""The process that computes one stage: `python -m flows.worker JOB.json`, started by children.py.

Progress goes to standard output as one JSON object a line; everything a library prints goes to
standard error.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from crnn.errors import UserError

TICK_SECONDS = 0.2


def main() -> None:
    """Compute the stage of the job file and report its outcome."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _end_with_parent(job["parent"])
    emit = _emitter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    from flows.stages import compute

    try:
        emit({"event": "done", **compute(job, emit)})
    except UserError as error:
        emit({"event": "refused", "kind": type(error).__name__, "message": str(error)})
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{where} in stage {job['stage']}; finished epochs are kept"
        emit({"event": "refused", "kind": "UserError", "message": message})
        raise


def _emitter(stream: TextIO) -> Callable[[dict[str, Any]], None]:
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


def _end_with_parent(parent: int) -> None:
    """Kill this process group as soon as the parent is gone, loader workers included."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    os.register_at_fork(after_in_child=_die_with_stage)


def _die_with_stage() -> None:
    """In a loader worker: end with the stage's process, at once where Linux allows it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
