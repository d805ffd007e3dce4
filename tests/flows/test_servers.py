"""`up`, schedules and notifications with real servers, a real cron tick and a real hook."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows import display, servers
from flows import project as state
from flows.experiment import NotifySettings
from flows.locks import single_flight
from flows.notice import notify
from flows.servers import free_port
from tests.flows.commands import PATIENCE
from tests.flows.conftest import (
    Project,
    copy_of,
    new_project,
    wait_for,
    wait_until,
)
from tests.flows.test_tracking import without_store

Finished = tuple[Project, dict[str, Any]]


def started(project: Project, *arguments: str, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as out:
        return subprocess.Popen(
            project.command(*arguments), stdout=out, stderr=out, **project.options()
        )


def wait_until_said(log: Path, words: str, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: words in log.read_text(), process, log)


def test_up_serves_both_and_leaves_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    project, store = without_store(finished, tmp_path / "project")
    assert not store.exists()
    # Nothing on this machine is asked of a proxy: there is none at this address.
    project.environment = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "example"}
    mlflow, prefect = free_port(), free_port()
    ports = ["--mlflow-port", str(mlflow), "--prefect-port", str(prefect)]
    server = started(project, "up", *ports, log=tmp_path / "log")
    try:
        wait_until_said(tmp_path / "log", "Ctrl-C stops both", server)
        assert wait_for(f"http://127.0.0.1:{mlflow}/health") == b"OK"
        assert wait_for(f"http://127.0.0.1:{prefect}/api/health") == b"true"
        settings = json.loads(wait_for(f"http://127.0.0.1:{prefect}/ui-settings"))
        assert settings["api_url"] == f"http://127.0.0.1:{prefect}/api"
        for port in (mlflow, prefect):
            assert not reachable_from_outside(port)
        again = project.run("up", *ports, code=2)
        assert "has its servers already" in again.stderr
        other = new_project(tmp_path / "other")
        assert f"port {mlflow} is taken" in other.run("up", *ports, code=2).stderr
        printed = project.frontier()
        assert printed["sweep_run"]
        runs = urllib.request.urlopen(
            urllib.request.Request(
                f"http://127.0.0.1:{prefect}/api/flow_runs/filter",
                b"{}",
                {"Content-Type": "application/json"},
            )
        )
        assert [run["state_type"] for run in json.loads(runs.read())] == ["COMPLETED"]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(PATIENCE)
    assert server.returncode == 0
    assert "both servers have stopped" in (tmp_path / "log").read_text()
    for port in (mlflow, prefect):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port))
    assert not (project.home / "servers.json").exists()


def reachable_from_outside(port: int) -> bool:
    """Whether another address of this machine answers; 127.0.0.2 is one where there is no other."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.2", port)) == 0


def test_a_cron_tick_fires_and_its_run_finishes(finished: Finished, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    log = tmp_path / "log"
    arguments = ["schedule", str(project.params), "--cron", "* * * * *"]
    scheduler = started(project, *arguments, "--set", "name=ticking", log=log)
    try:
        wait_until_said(log, "runs at * * * * *", scheduler)
        run = finished_run("ticking")
        assert run["state_type"] == "COMPLETED"
        assert run["auto_scheduled"]
    finally:
        scheduler.send_signal(signal.SIGINT)
        scheduler.wait(PATIENCE)
    assert "is no longer scheduled" in log.read_text()
    assert list(project.home.glob("reports/ticking/sweep-*/report.html"))


def of_deployment(name: str, kind: str) -> list[dict[str, Any]]:
    """What Prefect has of a deployment: `flow_runs`, or `deployments` for itself."""
    content = json.dumps({"deployments": {"name": {"any_": [name]}}}).encode()
    address = f"{os.environ['PREFECT_API_URL']}/{kind}/filter"
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())
    return found


def finished_run(name: str) -> dict[str, Any]:
    """The first run of a deployment, as soon as it is over."""
    over = ("COMPLETED", "FAILED", "CRASHED")
    return wait_until(
        lambda: [run for run in of_deployment(name, "flow_runs") if run["state_type"] in over]
    )[0]


def test_a_schedule_says_to_prefect_what_becomes_of_runs_that_overlap(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", name="overlapping")
    arguments = ["schedule", str(project.params), "--cron", "0 2 1 1 *", "--overlap"]

    def known(limit: int | None, strategy: str | None) -> bool:
        """Whether Prefect has the deployment with this limit of runs at a time."""
        found = of_deployment("overlapping", "deployments")
        limits = [(d["global_concurrency_limit"] or {}).get("limit") for d in found]
        strategies = [(d["concurrency_options"] or {}).get("collision_strategy") for d in found]
        return (limits, strategies) == ([limit], [strategy])

    for overlap, as_known in (
        ("skip", partial(known, 1, "CANCEL_NEW")),
        ("queue", partial(known, 1, "ENQUEUE")),
        ("allow", partial(known, None, None)),
    ):
        log = tmp_path / overlap
        scheduler = started(project, *arguments, overlap, log=log)
        try:
            wait_until(as_known, scheduler, log)
        finally:
            scheduler.send_signal(signal.SIGINT)
            scheduler.wait(PATIENCE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cron", "every day"], "is no schedule; five fields are needed"),
        (["--cron", "0 2 * * *", "--timezone", "Mars/Base"], "is no schedule"),
        (["--cron", "0 2 * * *", "--overlap", "maybe"], "maybe"),
        ([], "--cron"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    project = new_project(tmp_path / "project")
    refused = project.run("schedule", str(project.params), *arguments, code=2)
    assert said in refused.stderr


def test_a_failure_is_told_and_a_user_s_mistake_is_not_tried_again(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    hook = tmp_path / "hook.py"
    hook.write_text(f"import sys; open({str(told)!r}, 'a').write(sys.stdin.read())")
    command = f"{sys.executable} {hook}"
    project = new_project(
        tmp_path / "project",
        notify={"command": command},
        execution={"retries": 1, "retry_seconds": 0.1},
        baseline={"epochs": 1, "batch_size": 16, "learning_rate": 1e12, "clip_norm": 1e12},
    )
    failed = project.run("frontier", str(project.params), code=2)
    assert "the loss or its gradient became" in failed.stderr
    assert "tried again" not in failed.stderr
    event = json.loads(told.read_text())
    assert event["event"] == "failed"
    assert event["experiment"] == "tiny"
    assert "the loss or its gradient became" in event["reason"]


def test_a_run_whose_stage_dies_is_tried_again(tmp_path: Path) -> None:
    execution = {"retries": 1, "retry_seconds": 0.1}
    project = new_project(tmp_path / "project", ratios=[0.6], execution=execution)
    log = tmp_path / "log"
    process = started(project, "frontier", str(project.params), log=log)
    kill = ["pkill", "-KILL", "-P", str(process.pid), "-f", "flows.worker"]
    wait_until(lambda: subprocess.run(kill).returncode == 0, process, log)
    assert process.wait(PATIENCE) == 0, log.read_text()
    assert "tried again in 0.1 s" in log.read_text()


def test_a_hook_that_fails_is_logged_and_no_more() -> None:
    logged: list[str] = []
    notify(NotifySettings(command="false"), {"event": "failed"}, logged.append)
    notify(NotifySettings(command="/no/such/program"), {"event": "failed"}, logged.append)
    address = f"http://127.0.0.1:{free_port()}"
    notify(NotifySettings(webhook=address), {"event": "champion"}, logged.append)
    with answering(b"SSH-2.0-OpenSSH_9.2\r\n") as no_http:
        notify(NotifySettings(webhook=no_http), {"event": "champion"}, logged.append)
    assert len(logged) == 4
    assert all("did not arrive" in line for line in logged)
    notify(NotifySettings(), {"event": "failed"}, logged.append)
    assert len(logged) == 4


def test_a_command_that_fails_keeps_no_webhook_from_being_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logged: list[str] = []
    address = f"http://127.0.0.1:{free_port()}"
    notify(NotifySettings(command="false", webhook=address), {"event": "failed"}, logged.append)
    assert len(logged) == 2
    notify(NotifySettings(command="echo told"), {"event": "failed"}, logged.append)
    assert capfd.readouterr() == ("", "told\n"), "standard output is for results"


def test_a_webhook_is_posted_the_event() -> None:
    heard: list[tuple[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.path, json.loads(content)))
            self.send_response(204)
            self.end_headers()

    logged: list[str] = []
    event = {"event": "champion", "experiment": "tiny", "reason": "better"}
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/hook"
        notify(NotifySettings(webhook=address), event, logged.append)
    assert (heard, logged) == ([("/hook", event)], [])


@contextmanager
def answering(content: bytes) -> Iterator[str]:
    """Address of something that says these bytes to whoever comes."""

    def answer(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(content)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=[server], daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_a_schedule_finds_ports_and_believes_no_record_of_servers_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    project = new_project(tmp_path / "project")
    log = tmp_path / "log"
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
    with answering(page) as somebody, taken(4200):
        record = project.home / "servers.json"
        record.write_text(json.dumps({"mlflow": somebody, "prefect": somebody}))
        scheduler = started(
            project, "schedule", str(project.params), "--cron", "0 2 * * *", log=log
        )
        try:
            wait_until_said(log, "Ctrl-C ends this", scheduler)
            assert json.loads(record.read_text())["prefect"] in log.read_text()
            assert somebody not in log.read_text()
            assert re.search(r":4200\b", log.read_text()) is None
        finally:
            scheduler.send_signal(signal.SIGINT)
            scheduler.wait(PATIENCE)
    assert not record.exists()


def test_servers_that_are_starting_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
    with answering(page) as address, single_flight(servers.SERVERS):
        record = json.dumps({"mlflow": address, "prefect": address})
        said: list[str] = []

        def say(message: str) -> None:
            said.append(message)
            (state.home() / "servers.json").write_text(record)

        monkeypatch.setattr(display, "say", say)
        with servers.prefect() as found:
            assert found == f"{address}/api"
    assert said == ["waiting for the servers that start in another terminal"]


def test_an_address_that_was_given_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = "https://prefect.example/api/accounts/1/workspaces/2"
    monkeypatch.setenv("PREFECT_API_URL", cloud)
    with servers.prefect() as found:
        assert found == cloud


LOSES_ITS_LEASE = """
import ctypes, threading, time
from pathlib import Path
from prefect._internal.concurrency.cancellation import CancelledError
from flows import cli, project

def end(thread):
    while not list((project.home() / "work").glob("baseline-*")):
        time.sleep(0.1)
    error = ctypes.py_object(CancelledError)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

threading.Thread(target=end, args=[threading.get_ident()], daemon=True).start()
cli.main()
"""
"""Prefect throws this into a run whose lease on its deployment it could not renew."""


def test_a_run_that_loses_its_lease_goes_on(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", ratios=[0.6], export=None)
    command = [sys.executable, "-c", LOSES_ITS_LEASE, "frontier", str(project.params), "--json"]
    done = subprocess.run(command, **project.options(), capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "did not renew this run's place in time; it goes on" in done.stderr
    printed = json.loads(done.stdout)
    assert [row["point"] for row in printed["rows"]] == ["baseline", "0.6"]
    assert sorted(printed["computed"])[:2] == ["baseline", "data"]


@contextmanager
def taken(port: int) -> Iterator[None]:
    """Have something listen at a port, unless something does already."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(socket.create_server(("127.0.0.1", port)))
        yield
