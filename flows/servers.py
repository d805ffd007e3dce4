"""MLflow's and Prefect's servers on the project's stores, on this machine alone, until Ctrl-C."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crnn.errors import UserError
from crnn.files import write_atomic
from flows import display, project
from flows.locks import is_free, unless_held

HOST = "127.0.0.1"
MLFLOW_PORT, PREFECT_PORT = 5000, 4200

SERVERS = "servers"
"""Name of the lock that is held while there are servers of this state folder."""

LEASES_IN_FILES = "prefect.server.concurrency.lease_storage.filesystem"
"""Prefect forgets in a restart the leases it has in memory, and then never frees their slots."""

START_SECONDS = 600
"""A fresh database takes 13 s on a small machine, minutes on a slow one that trains meanwhile."""

STOP_SECONDS = 10

Command = list[str]


@dataclass(frozen=True)
class Servers:
    """Addresses of what is served.

    Attributes:
        mlflow: Of MLflow's pages.
        prefect: Of Prefect's pages; its API is below, at /api.
    """

    mlflow: str
    prefect: str


def running() -> Servers | None:
    """The servers of this state folder that `crnn-slim up` has started and that answer."""
    try:
        found = Servers(**json.loads(_record().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if is_free(SERVERS):  # The record was left by a killed one: whatever answers there is not ours.
        return None
    return found if all(_answers(page) for page in (found.mlflow, found.prefect)) else None


def _record() -> Path:
    return project.home() / "servers.json"


@contextmanager
def serving(mlflow_port: int, prefect_port: int) -> Iterator[Servers]:
    """Start both servers, wait until they answer, and stop them at the end.

    Raises:
        UserError: This folder has servers already, a port is taken, or a server does not start.
    """
    servers = Servers(f"http://{HOST}:{mlflow_port}", f"http://{HOST}:{prefect_port}")
    with contextlib.ExitStack() as started:
        if not started.enter_context(unless_held(SERVERS)):
            raise UserError(
                "this state folder has its servers already: `crnn-slim up` or `crnn-slim schedule`"
                " runs in another terminal"
            )
        for name, port in (("MLflow", mlflow_port), ("Prefect", prefect_port)):
            if not port_is_free(port):
                raise UserError(f"port {port} is taken; choose another with --{name.lower()}-port")
        from flows.tracking import create_store  # Importing MLflow takes seconds.

        create_store()
        logs = project.home() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        waits = [
            started.enter_context(_served(name, command, page, logs / f"{name.lower()}.log"))
            for name, command, page in (
                ("MLflow", mlflow_command(mlflow_port), servers.mlflow),
                ("Prefect", _prefect_command(prefect_port), servers.prefect),
            )
        ]
        for wait in waits:
            wait()
        write_atomic(_record(), json.dumps(servers.__dict__).encode())
        started.callback(_record().unlink, missing_ok=True)
        yield servers


@contextmanager
def prefect() -> Iterator[str]:
    """API of a Prefect server that can schedule: of one that is there, or of one of our own."""
    if named := os.environ.get("PREFECT_API_URL"):
        yield named
        return
    if there := _started():
        yield f"{there.prefect}/api"
        return
    ports = [port if port_is_free(port) else free_port() for port in (MLFLOW_PORT, PREFECT_PORT)]
    with serving(*ports) as servers:
        yield f"{servers.prefect}/api"


def _started() -> Servers | None:
    """The servers of this state folder, once they answer; None where nobody has started any."""
    if (there := running()) or is_free(SERVERS):
        return there
    display.say("waiting for the servers that start in another terminal")
    deadline = time.monotonic() + START_SECONDS
    while not is_free(SERVERS) and time.monotonic() < deadline:
        if there := running():
            return there
        time.sleep(0.5)
    return None


def mlflow_command(port: int) -> Command:
    """Command of an MLflow server on the project's store."""
    store = os.environ["MLFLOW_TRACKING_URI"]
    options = {"host": HOST, "port": str(port), "backend-store-uri": store, "workers": "1"}
    command = [sys.executable, "-P", "-m", "mlflow", "server"]
    return command + [part for name, value in options.items() for part in (f"--{name}", value)]


def _prefect_command(port: int) -> Command:
    command = [sys.executable, "-P", "-m", "prefect", "server", "start"]
    return [*command, "--host", HOST, "--port", str(port)]


@contextmanager
def _served(name: str, command: Command, page: str, log: Path) -> Iterator[Callable[[], None]]:
    """Run a server; what is yielded waits until it answers."""
    guarded = [sys.executable, "-P", "-m", "flows.children", str(os.getpid()), *command]
    # Prefect's pages ask the address that they are told, not the one that they came from.
    defaults = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES_IN_FILES}
    environment = {**defaults, **os.environ, "PREFECT_SERVER_UI_API_URL": f"{page}/api"}
    with log.open("wb") as out:
        server = subprocess.Popen(
            guarded,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    try:
        yield lambda: wait_for(name, server, page, log)
    finally:
        _stop(server)


def wait_for(name: str, server: "subprocess.Popen[bytes]", page: str, log: Path) -> None:
    """Wait until a server answers.

    Args:
        name: Whose it is.
        server: Its process.
        page: An address of it.
        log: What it says.

    Raises:
        UserError: It ended, or took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        if _answers(page):
            return
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "it says nothing"
    raise UserError(f"{name}'s server does not start ({reason}); see {log}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """End a server and all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _answers(page: str) -> bool:
    # MLflow has its health at /health, Prefect below its API; both serve a page at the root.
    try:
        with urllib.request.urlopen(page, timeout=5):
            return True
    except OSError:
        return False


def free_port() -> int:
    """A port on which nothing listens on this machine."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def port_is_free(port: int) -> bool:
    """Whether nothing listens there on this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0
