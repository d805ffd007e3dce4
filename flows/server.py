"""A Prefect server for one run, on this machine alone, that ends with the run whatever ends it.

Prefect's own temporary server outlives a pipeline that is killed, dies of a Ctrl-C before the
pipeline could tell it, and is started again for ever where its disk is full.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from crnn.errors import UserError
from flows.children import end_with_parent
from flows.locks import single_flight

START_SECONDS = 120
"""A fresh database takes 13 s on a small machine."""


def start_server() -> Callable[[], None]:
    """Start a server in the background, unless PREFECT_API_URL names one.

    It is stopped when this process exits, after Prefect has sent its last records.

    Returns:
        A function that waits until it answers, and raises a UserError where it does not.
    """
    if "PREFECT_API_URL" in os.environ:
        return lambda: None
    port = _free_port()
    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    starting = contextlib.ExitStack()
    # Two servers that create the same fresh database at once collide.
    starting.enter_context(single_flight("prefect-store", lambda: False, lambda _: None))
    command = [sys.executable, "-P", "-m", "flows.server", str(port), str(os.getpid())]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    atexit.register(_stop, server)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"

    def wait() -> None:
        with starting:
            _wait(server, log)

    return wait


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(5)
    server.kill()
    server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait(server: "subprocess.Popen[bytes]", log: Path) -> None:
    address = f"{os.environ['PREFECT_API_URL']}/health"
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise UserError(
        f"Prefect's server does not start ({lines[-1] if lines else 'it says nothing'}); see {log}"
    )


def main() -> None:
    """Serve until the parent is gone."""
    port, parent = (int(argument) for argument in sys.argv[1:])
    end_with_parent(parent)
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main()
