"""Commands as copies of a process that has imported MLflow: the same command line, real to its end,
without the import that takes longer than most commands.

Prefect is left to each copy: it reads its settings from the environment when it is imported.

`python -m tests.flows.commands` reads a request a line and answers each with an exit code.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PATIENCE = 600
"""Seconds after which what has to happen is given up: a machine under load can be slow."""


def run(
    arguments: Sequence[str], cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """What `python -m flows.cli ARGUMENTS` does and prints."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        request: dict[str, Any] = {
            "arguments": arguments,
            "files": [*map(str, files)],
            "cwd": str(cwd),
            "env": env,
            "cores": sorted(os.sched_getaffinity(0)),
        }
        commands = _commands()
        assert commands.stdin
        assert commands.stdout
        commands.stdin.write(json.dumps(request) + "\n")
        commands.stdin.flush()
        code = int(commands.stdout.readline())
        printed = [file.read_text() for file in files]
        return subprocess.CompletedProcess(arguments, code, *printed)


@cache
def _commands() -> subprocess.Popen[str]:
    """The process to copy; it ends with this one."""
    command = [sys.executable, "-m", "tests.flows.commands"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=pipe, stdout=pipe, text=True
    )
    atexit.register(process.communicate)
    return process


def main() -> None:
    """Copy this process for every request; what is returned from is a copy."""
    os.environ["GIT_PYTHON_REFRESH"] = "quiet"  # As flows.project sets it before the import.
    import mlflow.tracking  # noqa: F401

    gc.freeze()  # What is not looked at need not be copied.
    for line in sys.stdin:
        copy = os.fork()
        if copy == 0:
            return _be_command(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)


def _be_command(request: dict[str, Any]) -> None:
    signal.alarm(PATIENCE)
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for own, (path, mode) in enumerate(zip([os.devnull, *request["files"]], modes, strict=True)):
        os.dup2(os.open(path, mode), own)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.sched_setaffinity(0, request["cores"])
    sys.argv = ["flows.cli", *request["arguments"]]
    from flows import cli

    cli.main()


if __name__ == "__main__":
    main()
