"""A process that has imported torch once, of which the process of every stage is a copy.

Importing takes longer than most short stages. The template computes nothing, opens no device and
has no threads of its own, so that a copy (fork) is where a fresh process would be after its
imports. It starts with the first stage and ends with the pipeline. Linux only.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans become children of this process."""

LARGEST = 1 << 20
"""Bytes of a request."""

POLL_SECONDS = 0.01

ANSWER_SECONDS = 120
"""For the imports and a copy; a template that takes longer is replaced."""

_lock = threading.Lock()


@dataclass(frozen=True)
class _Template:
    """The template, as its pipeline sees it.

    Attributes:
        process: Itself.
        requests: Where it is asked for copies.
        environment: What it was started with.
    """

    process: subprocess.Popen[bytes]
    requests: socket.socket
    environment: dict[str, str]


_template: _Template | None = None


class Copy:
    """A copy of the template, as a child of this process; as much of a Popen as is used.

    Attributes:
        pid: Of the process and of its group.
        returncode: What it ended with, negative where a signal ended it; None while it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._waiting = threading.Lock()

    def poll(self) -> int | None:
        """What it ended with; None while it runs."""
        with self._waiting:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # Somebody else has waited for it.
                    pid, status = self.pid, 0
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """What it ended with, as soon as it has.

        Raises:
            subprocess.TimeoutExpired: It has not ended in so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("flows.worker", timeout or 0)
            time.sleep(POLL_SECONDS)
        return code


def start(job: Path, output: int, log: int, lock: int, environment: dict[str, str]) -> Copy:
    """Start flows.worker on a job, in a copy of the template.

    Args:
        job: Its file.
        output: Descriptor of its standard output.
        log: Descriptor of its standard error.
        lock: Descriptor that it holds for as long as it lives.
        environment: Its variables.
    """
    with _lock:
        try:
            return _ask(job, [output, log, lock], environment)
        except (OSError, ValueError):  # The template was killed: there is a new one.
            _forget()
        try:
            return _ask(job, [output, log, lock], environment)
        except (OSError, ValueError) as error:
            _forget()
            raise RuntimeError(
                f"no process can be started for {job} ({error}); what it printed is above"
            ) from error


def _ask(job: Path, descriptors: list[int], environment: dict[str, str]) -> Copy:
    template = _template or _started(environment)
    changes = environment.items() - template.environment.items()
    request = {
        "job": str(job),
        "folder": str(Path.cwd()),
        "set": dict(changes),
        "unset": sorted(template.environment.keys() - environment.keys()),
    }
    socket.send_fds(template.requests, [json.dumps(request).encode()], descriptors)
    return Copy(int(template.requests.recv(32)))


def _started(environment: dict[str, str]) -> _Template:
    global _template
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            # -P: a folder named flows where the command is run must not hide this package.
            [sys.executable, "-P", "-m", "flows.template", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    ours.settimeout(ANSWER_SECONDS)
    _template = _Template(process, ours, environment)
    return _template


def _forget() -> None:
    """Leave a template that does not answer: it ends when nobody can ask it any more."""
    global _template
    if _template:
        _template.requests.close()
        _template.process.kill()
        _template.process.wait()
    _template = None


def main() -> None:
    """Import what the stages need, and copy this process whenever it is asked for."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    from flows import worker

    worker.stages()
    import_module("torch._dynamo")  # The first optimizer does it, which takes seconds.
    while True:
        content, descriptors, _, _ = socket.recv_fds(requests, LARGEST, 3)
        if not content:
            return  # The pipeline has ended.
        _copy(requests, json.loads(content), descriptors)


def _copy(requests: socket.socket, request: Mapping[str, Any], descriptors: list[int]) -> None:
    """Start a process that is the grandchild of this one, and so the pipeline's child."""
    between = os.fork()
    if between == 0:
        _fork_again(requests, request, descriptors)
    _, status = os.waitpid(between, 0)
    if status:
        requests.send(b"none")
    for descriptor in descriptors:
        os.close(descriptor)


def _fork_again(
    requests: socket.socket, request: Mapping[str, Any], descriptors: list[int]
) -> NoReturn:
    code = 1
    try:
        between = os.getpid()
        if os.fork() == 0:
            _be_worker(between, requests, request, descriptors)
        code = 0
    finally:
        os._exit(code)


def _be_worker(
    between: int, requests: socket.socket, request: Mapping[str, Any], descriptors: list[int]
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        while os.getppid() == between:  # Until the pipeline is the parent.
            time.sleep(POLL_SECONDS / 10)
        with requests:
            requests.send(str(os.getpid()).encode())
        output, log, _ = descriptors
        for own, standard in ((output, 1), (log, 2)):
            os.dup2(own, standard)
            os.close(own)
        _take_over(request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _take_over(request: Mapping[str, Any]) -> None:
    """Do what `python -m flows.worker JOB` does, and look like it."""
    import setproctitle

    from flows import worker

    job = request["job"]
    setproctitle.setproctitle(f"{sys.executable} -P -m flows.worker {job}")
    for name in request["unset"]:
        os.environ.pop(name, None)
    os.environ.update(request["set"])
    os.chdir(request["folder"])
    sys.argv = ["flows.worker", job]
    worker.main()


if __name__ == "__main__":
    main()
