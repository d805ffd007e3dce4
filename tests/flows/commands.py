"""Commands as copies of a process that has imported Prefect and MLflow: the same command line, real
to its end, without the imports that take longer than most commands.

`python -m tests.flows.commands` reads a request a line and answers each with an exit code.
"""

import atexit
import gc
import json
import os
import select
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows import project

PATIENCE = 300
"""Seconds for a command."""


def run(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python -m flows.cli ...` does and prints."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        request = {"command": command, "files": list(map(str, files)), "cwd": str(cwd), "env": env}
        commands = _commands()
        assert commands.stdin
        assert commands.stdout
        commands.stdin.write(json.dumps(request) + "\n")
        commands.stdin.flush()
        answered = select.select([commands.stdout], [], [], PATIENCE)[0]
        assert answered, f"{command} still runs: {files[1].read_text()}"
        code = int(commands.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


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
    project.configure_environment()  # As before the imports of every command.
    import flows.pipeline  # noqa: F401

    gc.freeze()  # What is not looked at need not be copied.
    for line in sys.stdin:
        copy = os.fork()
        if copy == 0:
            return _be_command(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)


def _be_command(request: dict[str, Any]) -> None:
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for own, (path, mode) in enumerate(zip([os.devnull, *request["files"]], modes, strict=True)):
        os.dup2(os.open(path, mode), own)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["command"][2:]
    from prefect.context import refresh_global_settings_context

    from flows import cli

    configure = project.configure_environment

    def and_tell_prefect() -> None:
        configure()
        refresh_global_settings_context()

    project.configure_environment = and_tell_prefect
    cli.main()


if __name__ == "__main__":
    main()
