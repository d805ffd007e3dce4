"""Where state lives, and what Prefect and MLflow are told before they are imported."""

import os
import platform
import subprocess
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from crnn.errors import SettingsError
from crnn.files import write_atomic


def home() -> Path:
    """The state folder: $CRNN_SLIM_HOME, or .pipeline in the current folder."""
    return Path(os.environ.get("CRNN_SLIM_HOME") or ".pipeline").resolve()


def identity() -> str:
    """Name of this state folder, whose locks tell whether a recorded run is alive.

    It is drawn once: machines have the same host name, and containers another after each start. A
    copy of the folder has another name, by the inode.
    """
    path = home() / "identity"
    if not path.exists():  # Of two that begin at once, the first is not known again if it dies.
        write_atomic(path, uuid4().hex.encode())
    return f"{path.read_text(encoding='utf-8')}-{path.stat().st_ino}"


def stages_folder() -> Path:
    """Finished stages, one folder a key."""
    return home() / "stages"


def work_folder() -> Path:
    """Stages under way, one folder a key."""
    return home() / "work"


def locks_folder() -> Path:
    """One lock file a stage key."""
    return home() / "locks"


def set_aside_folder() -> Path:
    """What was damaged or made of other samples, kept for whoever wants to know what happened."""
    return home() / "set-aside"


def set_aside(folder: Path) -> Path:
    """Move a folder that cannot be used out of the way; where it is now."""
    target = set_aside_folder() / f"{folder.name}-{time.time_ns()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    return target


def reports_folder() -> Path:
    """Frontier tables and plots, one folder an experiment."""
    return home() / "reports"


def mlflow_store() -> Path:
    """MLflow's store, where the user has named no other."""
    return home() / "mlflow" / "mlflow.db"


def configure_environment() -> None:
    """Point Prefect and MLflow at the state folder. What the user has set already wins.

    Both read the environment when they are imported, so this comes first.

    Raises:
        SettingsError: The state folder is a file, or where SQLite's addresses cannot say.
    """
    root = home()
    if "?" in str(root):
        raise SettingsError(
            f"the path of the state folder, {root}, has a '?', which an address of SQLite cannot"
            " have; set CRNN_SLIM_HOME to another"
        )
    if root.exists() and not root.is_dir():
        raise SettingsError(f"the state folder, {root}, is a file; set CRNN_SLIM_HOME to a folder")
    mlflow_store().parent.mkdir(parents=True, exist_ok=True)
    defaults = {
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Records go to the Prefect UI; the terminal belongs to our own progress lines.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "MLFLOW_TRACKING_URI": f"sqlite:///{mlflow_store()}",
        # Stages never wait for MLflow: what could not be logged is logged later.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    hosts = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")).split(",")
    if "*" not in hosts:
        # A proxy cannot reach the servers that we start on this machine.
        direct = ",".join(dict.fromkeys([*filter(None, hosts), "127.0.0.1", "localhost"]))
        os.environ.update(no_proxy=direct, NO_PROXY=direct)


@cache
def git_commit() -> str:
    """Commit of the code that runs, "-dirty" behind it where files differ from it.

    "unknown" outside a checkout: an installed copy may lie within some other repository.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root:
            return "unknown"
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> list[int]:
    """Cores this process may use: fewer than the machine has under an affinity or a container."""
    every = range(os.cpu_count() or 1)
    own = sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return own[: max(1, int(quota) // int(period))]
    return own


def processor() -> str:
    """What the CPU calls itself, where Linux says so."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor()


def timing_ground() -> str:
    """What a latency depends on besides the network: CPU and runtimes, as a person reads it."""
    runtimes = (f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    return ", ".join((processor(), *runtimes))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
