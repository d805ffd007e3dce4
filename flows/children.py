"""Running a stage in a process of its own, and stopping it.

The child computes, the parent watches: it passes on progress, turns the child's refusal into the
same exception here, and kills the child's whole process group when the pipeline stops. A child
whose parent dies ends itself within a second.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from crnn import errors
from crnn.errors import StoppedError, UserError
from flows import template

Event = dict[str, Any]

TICK_SECONDS = 0.2

SHARING = {"GOMP_SPINCOUNT": "20000"}
"""GNU OpenMP: how long a thread spins for the next piece of work before it sleeps. Its default of
milliseconds makes training beside any other process nearly twice as slow."""

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables of a launcher that the pipeline itself may run under; a stage has one of its own."""

KEPT = "finished stages and epochs are kept, run the same command to go on"

Child = template.Copy | subprocess.Popen[bytes]


class ChildDiedError(RuntimeError):
    """A stage's process ended without a result or an explanation."""


def run_child(
    job: dict[str, Any], lock: int, on_event: Callable[[Event], None], stop: threading.Event
) -> dict[str, Any]:
    """Run flows.worker on a job and return what it reports at the end.

    Args:
        job: As flows.worker expects it; written to job.json in its work folder, where standard
            error goes to worker.log.
        lock: Descriptor of the stage's lock, which the child holds as well.
        on_event: Called with every progress event.
        stop: Ends the child as soon as it is set.

    Raises:
        UserError: What the child refused, in its words.
        StoppedError: stop was set.
        ChildDiedError: The child ended in any other way; names the log file.
    """
    folder = Path(job["folder"])
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    child, output = _started(folder, lock)
    watcher = threading.Thread(target=_kill_when_stopped, args=(child, stop), daemon=True)
    watcher.start()
    outcome: dict[str, Any] | None = None
    patience = 10
    try:
        for line in output:
            event = json.loads(line)
            if event["event"] == "done":
                outcome = event
            elif event["event"] == "refused":
                patience = 0
                raise getattr(errors, event["kind"], UserError)(event["message"])
            else:
                on_event(event)
    finally:
        output.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0 if stop.is_set() else patience)
        _kill(child)
        child.wait()
    if stop.is_set() and outcome is None:
        raise StoppedError(f"stopped in {job['stage']}; {KEPT}")
    if outcome is None:
        raise ChildDiedError(
            f"the process of stage {job['stage']} died with code {child.returncode};"
            f" see {folder / 'worker.log'}; run again to go on from its last epoch"
        )
    return {name: outcome[name] for name in ("result", "metrics", "seconds")}


def _started(folder: Path, lock: int) -> tuple[Child, IO[bytes]]:
    """The process of a stage, and what it prints."""
    job = folder / "job.json"
    environment = {**SHARING, **{n: v for n, v in os.environ.items() if n not in OF_LAUNCHERS}}
    with (folder / "worker.log").open("ab") as log:
        if sys.platform == "linux":
            ours, theirs = os.pipe()
            try:
                child = template.start(job, theirs, log.fileno(), lock, environment)
            finally:
                os.close(theirs)
            return child, os.fdopen(ours, "rb")
        fresh = subprocess.Popen(
            # -P: a folder named flows where the command is run must not hide this package.
            [sys.executable, "-P", "-m", "flows.worker", str(job)],
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,
        )
        assert fresh.stdout
        return fresh, fresh.stdout


def end_with_parent(parent: int) -> None:
    """In a child: kill its process group as soon as the parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _kill_when_stopped(child: Child, stop: threading.Event) -> None:
    while child.poll() is None:
        if stop.wait(TICK_SECONDS):
            _kill(child)
            child.wait()


def _kill(child: Child) -> None:
    """Kill the child and its loader workers. Its files are safe at any instant."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def main() -> None:
    """Run the command behind the first argument, and end it with the process of that number.

    A SIGTERM to the group is for the command, which ends in its own time; this waits for it.
    """
    parent, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: None)
    end_with_parent(int(parent))
    sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main()
