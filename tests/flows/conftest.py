"""One tiny pipeline, really run once a session, that the tests of flows look at and go on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
import yaml
from filelock import FileLock
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors import safe_open
from safetensors.numpy import save_file

from crnn.files import sha256
from flows.servers import free_port
from flows.stages.work import READING, Work
from tests.flows import commands
from tests.flows.commands import PATIENCE

TINY: dict[str, Any] = {
    "name": "tiny",
    "ratios": [0.3, 0.6],
    "data": {
        "train": 48,
        "val": 16,
        "max_width": 160,
        "text": {"alphabet": "0123456789", "min_length": 1, "max_length": 4},
    },
    "model": {"width": 0.1, "hidden": 8},
    "baseline": {"epochs": 2, "batch_size": 16},
    "sparse": {"epochs": 4, "batch_size": 8, "target_ratio": 0.6},
    "finetune": {"epochs": 1, "batch_size": 16},
    "export": None,  # tests/flows/test_exports.py exports; elsewhere it would only take time.
}


Found = TypeVar("Found")


@dataclass
class Project:
    """A state folder, an experiment file, and the real command line on both."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / ".pipeline"

    @property
    def database(self) -> Path:
        return self.home / "mlflow" / "mlflow.db"

    @property
    def params(self) -> Path:
        return self.folder / "tiny.yaml"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *arguments]

    def options(self) -> dict[str, Any]:
        # Other tests run beside: a thread that waits must not spin.
        shared = {"CRNN_SLIM_HOME": str(self.home), "GOMP_SPINCOUNT": "0"}
        environment = {**os.environ, **shared, **self.environment}
        return {"cwd": Path(__file__).parents[2], "env": environment, "text": True}

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        options = self.options()
        result = commands.run(arguments, options["cwd"], options["env"])
        assert result.returncode == code, result.stderr
        return result

    def frontier(self, *arguments: str) -> dict[str, Any]:
        output: dict[str, Any] = json.loads(
            self.run("frontier", str(self.params), "--json", *arguments).stdout
        )
        return output

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Manifest of every finished stage, by label."""
        found = [json.loads(p.read_text()) for p in self.home.glob("stages/*/manifest.json")]
        return {manifest["label"]: manifest for manifest in found}


def new_project(folder: Path, fresh: bool = False, **changes: Any) -> Project:
    """A project of its own with the tiny experiment.

    Unless fresh it has a store of MLflow's already, which takes seconds to set up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder)
    project.params.write_text(yaml.safe_dump({**TINY, **changes}), encoding="utf-8")
    if not fresh:
        project.database.parent.mkdir(parents=True)
        project.database.write_bytes(_empty_database())
    return project


@cache
def _empty_database() -> bytes:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{file}").search_experiments()
        return file.read_bytes()


def from_nothing(**changes: Any) -> Callable[[Path], Project]:
    """Makes the tiny experiment in a folder without any store."""
    return partial(new_project, fresh=True, **changes)


def copy_of(finished: tuple[Project, Any], folder: Path) -> Project:
    """The finished project once more, to go on from or to damage."""
    ended = shutil.ignore_patterns("flow-*.lock")  # Of a run of another test, in this instant.
    shutil.copytree(finished[0].folder, folder, ignore=ended)
    return Project(folder)


def begun_by(finished: tuple[Project, Any], folder: Path, **changes: Any) -> Project:
    """An experiment that finds data and baseline of the finished project in its cache."""
    project = new_project(folder, **changes)
    for label in ("data", "baseline"):
        key = finished[0].manifests()[label]["key"]
        place = Path("stages") / key
        shutil.copytree(finished[0].home / place, project.home / place)
    return project


def client_of(project: Project) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.database}")


def runs_of(project: Project, kind: str, experiment_name: str = "tiny") -> dict[str, Run]:
    client = client_of(project)
    experiment = client.get_experiment_by_name(experiment_name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")
    # Networks are timed anew, all together, when one is added.
    once = [run.info.run_name for run in found if run.info.run_name != "latency"]
    assert len(set(once)) == len(once)
    return {run.info.run_name: run for run in found}


def points_of(project: Project, sweep_run: str) -> dict[str, Run]:
    """MLflow runs of the points of one sweep."""
    client = client_of(project)
    experiment = client.get_run(sweep_run).info.experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{sweep_run}'")
    return {run.info.run_name: run for run in found}


def wait_for(address: str, seconds: float = PATIENCE) -> bytes:
    """Content of a page as soon as its server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                content: bytes = response.read()
                return content
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def wait_until(
    finds: Callable[[], Found],
    running: subprocess.Popen[str] | None = None,
    log: Path | None = None,
) -> Found:
    """What is found as soon as it is something; before, the process must not end."""
    deadline = time.monotonic() + PATIENCE
    while not (found := finds()):
        said = log.read_text(encoding="utf-8") if log else ""
        assert running is None or running.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    return found


def wait_for_epoch(running: subprocess.Popen[str], *homes: Path) -> Path:
    """State of a sparse stage that has finished an epoch, in one of these state folders."""

    def states() -> list[Path]:
        return [file for home in homes for file in home.glob("work/sparse-*/state.safetensors")]

    return wait_until(states, running)[0]


def children_of(pid: int, command: str = "flows.worker") -> list[int]:
    """Processes of the stages that a pipeline started, and of their loaders, or of other kinds."""
    parents = [str(pid)]
    found = []
    while parents:
        search = ["pgrep", "-f", command, "-P", ",".join(parents)]
        parents = subprocess.run(search, capture_output=True, text=True).stdout.split()
        found += [int(line) for line in parents]
    return found


@pytest.fixture(scope="session", autouse=True)
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server for all tests: a pipeline that starts its own takes ten seconds."""
    with serve_prefect(tmp_path_factory.mktemp("prefect")) as address:
        yield address


@contextmanager
def serve_prefect(home: Path, **more: str) -> Iterator[str]:
    """Start a real Prefect server, and point all pipelines started here at it.

    Variables beside its home may name another database.
    """
    before = os.environ.get("PREFECT_API_URL")
    address = f"http://127.0.0.1:{free_port()}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    command += ["--port", address.rsplit(":", 1)[1].removesuffix("/api")]
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        **more,
    }
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"{address}/health")
        os.environ["PREFECT_API_URL"] = address
        yield address
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        if before:
            os.environ["PREFECT_API_URL"] = before
        server.terminate()
        server.wait(PATIENCE)


@contextmanager
def serve_mlflow(
    folder: Path, port: int, database: str = "", artifacts: str = "", **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A real MLflow server on the store in the folder, in a process group of its own."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", database or f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
    options: dict[str, Any] = {"env": {**os.environ, **more}, "start_new_session": True}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, **options)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


LONG = {
    "sparse": {"epochs": 24, "batch_size": 8, "target_ratio": 0.6},
    "ratios": [0.6],
    "execution": {"loader_workers": 1},
}
"""Changes that leave time to stop a sparse stage in its midst, which has a loader process."""


def computed(
    folder: pytest.TempPathFactory, name: str, made: Callable[[Path], Project], *arguments: str
) -> tuple[Project, Any]:
    """A finished project and what it printed; test processes side by side share it."""
    base = folder.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    printed = base / f"{name}.json"
    with FileLock(base / f"{name}.lock"):
        if not printed.exists():
            printed.write_text(json.dumps(made(base / name).frontier(*arguments)))
    return Project(base / name), json.loads(printed.read_text())


def work_of(
    project: Project, stage: str, inputs: dict[str, Any], folder: Path, **settings: Any
) -> Work:
    """A stage to be computed in this process, on what finished stages of a project left."""
    experiment = yaml.safe_load(project.params.read_text())
    job = {
        "stage": stage,
        "settings": settings,
        "data": experiment["data"],
        "seed": 0,
        "inputs": {
            name: {
                "file": str(project.home / "stages" / made["key"] / made["result"]),
                "sha256": made["files"][made["result"]]["sha256"],
            }
            for name, made in inputs.items()
        },
        "cpus": 1,
        "loader_workers": 0,
    }
    (folder / "out").mkdir(parents=True)
    return Work(job, folder, folder / "out", lambda event: None)


def squeeze(work: Work, width: int, index: Path) -> None:
    """Give a stage the samples of its data as if data.max_width had been so many pixels."""
    with safe_open(work.input("data"), "np") as found:
        tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        reading = {**json.loads(found.metadata()[READING]), "max_width": width}
    tensors["val_widths"] = tensors["val_widths"].clip(max=width)
    save_file(tensors, index, {READING: json.dumps(reading)})
    work.job["inputs"]["data"] = {"file": str(index), "sha256": sha256(index)}


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str
) -> tuple[Project, dict[str, Any]]:
    """The tiny frontier, computed, and what it printed. Do not change what others rely on."""
    return computed(tmp_path_factory, "tiny", from_nothing())


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, finished: tuple[Project, dict[str, Any]]
) -> Project:
    """The long experiment, computed without a stop."""
    return computed(tmp_path_factory, "long", lambda at: begun_by(finished, at, **LONG))[0]


READABLE: dict[str, Any] = {
    "data": {**TINY["data"], "text": {"alphabet": "0", "min_length": 1, "max_length": 1}},
    "baseline": {"epochs": 12, "batch_size": 4, "learning_rate": 1e-2},
    "export": {},
    "quantize": {"judged_lines": 48, "calibration_lines": 16},
}
"""Changes with which the networks read something, of an alphabet of one, and are exported."""


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str
) -> tuple[Project, dict[str, Any]]:
    """A tiny frontier with its exports, in float and in 8 bits, and a champion."""
    return computed(tmp_path_factory, "exported", from_nothing(**READABLE))
