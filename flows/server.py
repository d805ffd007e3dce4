"""A Prefect server for one run, on this machine alone, that ends with the run whatever ends it.

Prefect's own temporary server outlives a pipeline that is killed, dies of a Ctrl-C before the
pipeline could tell it, and is started again for ever where its disk is full.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from flows import servers
from flows.children import end_with_parent
from flows.locks import single_flight

RESTARTS = 3


_own = False


def is_own() -> bool:
    """Whether the server that this process uses is one that nobody else can use."""
    return _own or "PREFECT_API_URL" not in os.environ


def start_server() -> Callable[[], None]:
    """Start a server in the background, unless PREFECT_API_URL names one or `up` has one.

    It is stopped when this process exits, after Prefect has sent its last records.

    Returns:
        A function that waits until it answers, and raises a UserError where it does not.
    """
    if "PREFECT_API_URL" in os.environ:
        return lambda: None
    if there := servers.running():
        os.environ["PREFECT_API_URL"] = f"{there.prefect}/api"
        return lambda: None
    global _own
    _own = True
    port = servers.free_port()
    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    starting = contextlib.ExitStack()
    # Two servers that create the same fresh database at once collide.
    starting.enter_context(single_flight("prefect-store"))
    log.unlink(missing_ok=True)
    server = _Server(port, log)
    atexit.register(server.stop)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"

    def wait() -> None:
        with starting:
            address = f"{os.environ['PREFECT_API_URL']}/health"
            servers.wait_for("Prefect", server.process, address, log)
        threading.Thread(target=server.keep, daemon=True).start()

    return wait


class _Server:
    """A server's process, started again where something kills it.

    Attributes:
        process: The present one.
    """

    def __init__(self, port: int, log: Path) -> None:
        self._port, self._log = port, log
        self._stopping = False
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "flows.server", str(self._port), str(os.getpid())]
        with self._log.open("ab") as out:
            return subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def keep(self) -> None:
        """Start it again when it dies; Prefect's client retries for a minute."""
        for _ in range(RESTARTS):
            self.process.wait()
            if self._stopping:
                return
            self.process = self._start()

    def stop(self) -> None:
        self._stopping = True
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        self.process.wait()


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
