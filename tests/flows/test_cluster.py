"""Many machines: Postgres behind Prefect and MLflow, stages in S3, workers of Dask and of Ray.

Real servers all of them. A machine is a state folder of its own; the servers are all they share.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.servers import LEASES_IN_FILES, free_port
from tests.flows.commands import PATIENCE
from tests.flows.conftest import (
    LONG,
    TINY,
    Project,
    children_of,
    new_project,
    serve_mlflow,
    serve_prefect,
    wait_for,
    wait_for_epoch,
    wait_until,
)
from tests.flows.test_store import machines, start, written

pytestmark = pytest.mark.skipif(
    not os.environ.get("CRNN_SLIM_CLUSTER_TEST"),
    reason="takes minutes, servers and workers; `make cluster-test` installs and runs it",
)
ROOT = Path(__file__).parents[2]
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
TRAINED = ("baseline", "sparse", "finetune 0.3", "finetune 0.6", "scratch 0.6")
DASK, RAY = "dask", "ray"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which every machine finds S3, Prefect and MLflow, these on Postgres."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        s3 = stack.enter_context(serve_s3(folder))
        database = stack.enter_context(serve_postgres())
        connection = {
            "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{database}/prefect",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES_IN_FILES,
        }
        prefect = stack.enter_context(serve_prefect(folder, **connection))
        port = free_port()
        stack.enter_context(
            serve_mlflow(
                folder, port, f"postgresql+psycopg2://{database}/mlflow", "s3://slim/mlflow", **s3
            )
        )
        mlflow = f"http://127.0.0.1:{port}"
        yield {**s3, "PREFECT_API_URL": prefect, "MLFLOW_TRACKING_URI": mlflow}


@contextmanager
def serve_s3(folder: Path) -> Iterator[dict[str, str]]:
    """A real S3 server, and the environment in which it is found."""
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with running(command, folder / "s3.log", {}):
        wait_for(f"{address}/moto-api/")
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="slim")
        places = {"AWS_ENDPOINT_URL": address, "MLFLOW_S3_ENDPOINT_URL": address}
        yield {**S3_KEYS, **places, "AWS_ALLOW_HTTP": "true"}


@contextmanager
def serve_postgres() -> Iterator[str]:
    """A real Postgres with a database for each server; its address, as user@host:port."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
    owner = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder = Path(
        subprocess.run(
            [*owner, "mktemp", "-d"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        command = [*owner, str(programs / program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)

    try:
        run("initdb", "--pgdata", str(folder / "data"), "--username", "slim", "--auth", "trust")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        run("pg_ctl", "--pgdata", str(folder / "data"), "-l", str(folder / "log"), "-w",
            "-o", options, "start")  # fmt: skip
        for name in ("prefect", "mlflow"):
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "slim", name)
        yield f"slim@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "--pgdata", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder)


@contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, killed at the end."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "GOMP_SPINCOUNT": "0", **environment},
        )
    try:
        yield process
    finally:
        with ExitStack() as ignoring:
            ignoring.callback(process.wait)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


Workers = dict[str, subprocess.Popen[bytes]]


@contextmanager
def dask(folder: Path, servers: dict[str, str]) -> Iterator[tuple[str, Workers]]:
    """A scheduler of Dask's and two workers, each with a state folder; its address."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    module = [sys.executable, "-m"]
    scheduler = [*module, "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    scheduler += ["--port", str(port), "--no-dashboard"]
    worker = [*module, "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    with ExitStack() as stack:
        stack.enter_context(running(scheduler, folder / "scheduler.log", servers))
        workers = {}
        for name in ("a", "b"):
            own = {**servers, "CRNN_SLIM_HOME": str(folder / name)}
            command = [*worker, "--name", name, "--local-directory", str(folder / f"dask-{name}")]
            process = stack.enter_context(running(command, folder / f"{name}.log", own))
            workers[name] = process
        yield address, workers


@contextmanager
def ray(folder: Path, servers: dict[str, str]) -> Iterator[tuple[str, Workers]]:
    """A local cluster of Ray's, with room for one stage at a time; its address."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--port", str(port), "--num-cpus", "1", "--include-dashboard", "false"]
    command += ["--node-ip-address", "127.0.0.1", "--temp-dir", f"/tmp/ray-{port}"]
    own = {**servers, "CRNN_SLIM_HOME": str(folder / "a")}
    try:
        with running(command, folder / "a.log", own) as head:
            wait_until(lambda: listens(port))
            yield f"127.0.0.1:{port}", {"a": head}
    finally:
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


CLUSTERS = {DASK: dask, RAY: ray}


def submitted(folder: Path, kind: str, address: str, **changes: Any) -> Project:
    """The experiment for a cluster; of the params file only the section `execution` differs."""
    execution = {"runner": kind, "cluster": address, "store": f"s3://slim/{folder.name}"}
    return new_project(folder / "flow", **{**changes, "execution": execution})


def models(project: Project) -> dict[str, tuple[str, str]]:
    """Key and model's digest of every training."""
    found = project.manifests()
    return {
        label: (found[label]["key"], found[label]["files"]["model.safetensors"]["sha256"])
        for label in TRAINED
        if label in found
    }


@pytest.mark.parametrize("kind", [DASK, RAY])
def test_a_sweep_on_a_cluster_is_the_local_one(
    tmp_path: Path, servers: dict[str, str], kind: str
) -> None:
    controls = {"scratch": True, "ratios": [0.6]}  # They start from the cut of another point.
    alone = new_project(tmp_path / "alone", controls=controls)
    local = alone.frontier()
    with CLUSTERS[kind](tmp_path, servers) as (address, workers):
        project = submitted(tmp_path, kind, address, controls=controls)
        project.environment = servers
        swept = project.frontier()
        assert models(project) == models(alone)
        assert sorted(swept["computed"]) == sorted(local["computed"])
        made = [
            line.split(":")[0]
            for name in workers
            for line in (tmp_path / f"{name}.log").read_text().splitlines()
            if ": done in " in line
        ]
        if kind == DASK:  # Ray keeps what its workers print to itself.
            assert sorted(made) == sorted(local["computed"]), "no stage was computed twice"
        for name in workers:
            assert list((tmp_path / name / "stages").iterdir())
        assert project.frontier()["computed"] == []


def test_another_worker_goes_on_when_one_dies(tmp_path: Path, servers: dict[str, str]) -> None:
    with dask(tmp_path, servers) as (address, workers):
        project = submitted(tmp_path, DASK, address, **LONG)
        project.environment = servers
        begun = start(project)
        state = wait_for_epoch(begun, *(tmp_path / name for name in workers))
        name = state.relative_to(tmp_path).parts[0]
        os.killpg(workers[name].pid, signal.SIGKILL)
        out, err = begun.communicate(timeout=PATIENCE)
        assert begun.returncode == 0, err
        computed = json.loads(out)["computed"]
        assert len(set(computed)) == len(computed)
        assert set(TRAINED) & set(project.manifests()) <= set(computed)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_workers_stop_with_the_run(tmp_path: Path, servers: dict[str, str], how: int) -> None:
    with dask(tmp_path, servers) as (address, _):
        project = submitted(tmp_path, DASK, address, **LONG)
        project.environment = servers
        begun = start(project)
        state = wait_for_epoch(begun, tmp_path / "a", tmp_path / "b")
        begun.send_signal(how)
        begun.communicate(timeout=PATIENCE)
        assert begun.returncode
        time.sleep(8)
        written_at = state.stat().st_mtime
        time.sleep(4)
        assert state.stat().st_mtime == written_at, "nothing trains any more"


def test_the_workers_of_a_pool_share_what_two_runs_need(
    tmp_path: Path, servers: dict[str, str]
) -> None:
    """As prefect.yaml says, with a worker on each of two machines, and a run for each of them."""

    def prefect(*arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        subprocess.run(command, env={**os.environ, **servers}, cwd=ROOT, check=True)

    shipped = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    shipped["deployments"][0] |= {"work_pool": {"name": "pool"}, "schedules": []}
    del shipped["deployments"][0]["concurrency_limit"]  # Of one run at a time.
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump(shipped), encoding="utf-8")
    prefect("work-pool", "create", "pool", "--type", "process")
    prefect("deploy", "--all", "--prefect-file", str(file))
    with ExitStack() as stack:
        for name in ("a", "b"):
            worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "pool"]
            worker += ["--name", name, "--limit", "1"]
            own = {**servers, "CRNN_SLIM_HOME": str(tmp_path / name)}
            stack.enter_context(running(worker, tmp_path / f"{name}.log", own))
        for name, ratio in (("few", 0.3), ("many", 0.6)):
            changes = {"name": name, "ratios": [ratio]}
            experiment = {**TINY, **changes, "execution": {"store": "s3://slim/pool"}}
            parameters = json.dumps({"experiment": experiment})
            prefect("deployment", "run", "frontier/quickstart", "--params", parameters)
        wait_until(lambda: len(list(tmp_path.glob("*/reports/*/sweep-*/frontier.json"))) == 2)
    logs = [(tmp_path / f"{name}.log").read_text(encoding="utf-8") for name in ("a", "b")]
    for stage in ("baseline", "sparse"):
        assert sum(log.count(f"\n{stage}: done in ") for log in logs) == 1, "it serves both runs"
    assert all(list((tmp_path / name / "reports").iterdir()) for name in ("a", "b"))


def test_a_cluster_that_does_not_answer_is_refused(tmp_path: Path, servers: dict[str, str]) -> None:
    project = submitted(tmp_path, DASK, f"tcp://127.0.0.1:{free_port()}")
    project.environment = servers
    assert "execution.cluster" in project.run("frontier", str(project.params), code=2).stderr


def test_workers_need_an_mlflow_for_all(tmp_path: Path, servers: dict[str, str]) -> None:
    project = submitted(tmp_path, DASK, "tcp://127.0.0.1:9")
    project.environment = {k: v for k, v in servers.items() if k != "MLFLOW_TRACKING_URI"}
    refused = project.run("frontier", str(project.params), code=2)
    assert "needs an MLflow server that all machines use" in refused.stderr


def test_another_machine_goes_on_when_one_dies(tmp_path: Path, servers: dict[str, str]) -> None:
    one, other = machines(tmp_path, "s3://slim/dies", **LONG)
    one.environment = other.environment = servers
    begun = start(one)
    wait_for_epoch(begun, one.home)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.communicate()
    finished = other.run("frontier", str(other.params), "--json")
    assert "waiting for another machine" in finished.stderr
    computed = json.loads(finished.stdout)["computed"]
    assert "sparse" in computed
    assert "baseline" not in computed, "the other machine had finished that"
    assert one.frontier()["computed"] == []
    assert written(one) == written(other)


def test_a_machine_that_comes_back_late_changes_nothing(
    tmp_path: Path, servers: dict[str, str]
) -> None:
    one, other = machines(tmp_path, "s3://slim/late", **LONG)
    one.environment = other.environment = servers
    late = start(one)
    wait_for_epoch(late, one.home)
    workers = children_of(late.pid, "python")
    for pid in (late.pid, *workers):
        os.kill(pid, signal.SIGSTOP)
    finished = other.frontier()
    for pid in (*workers, late.pid):
        os.kill(pid, signal.SIGCONT)
    out, err = late.communicate(timeout=PATIENCE)
    assert late.returncode == 0, err
    assert "another machine has finished it first" in err
    assert json.loads(out)["rows"] == finished["rows"]
    assert written(one) == written(other)
