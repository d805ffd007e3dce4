"""Machines that share their finished stages: state folders of their own, one store, one Prefect."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.flows.commands import PATIENCE
from tests.flows.conftest import Project, new_project

Finished = tuple[Project, dict[str, Any]]


@pytest.fixture
def folder_store(tmp_path: Path) -> str:
    """A store in a folder that both machines see."""
    return (tmp_path / "store").as_uri()


def machines(folder: Path, store: str, **changes: Any) -> tuple[Project, Project]:
    """Two state folders with the same experiment and store."""
    execution = {**changes.pop("execution", {}), "store": store}
    one, other = (
        new_project(folder / name, **{"ratios": [0.6], **changes}, execution=execution)
        for name in ("one", "other")
    )
    return one, other


def written(project: Project) -> dict[str, bytes]:
    """Manifests, byte for byte, by key."""
    return {p.parent.name: p.read_bytes() for p in project.home.glob("stages/*/manifest.json")}


def start(project: Project) -> subprocess.Popen[str]:
    command = project.command("frontier", str(project.params), "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, start_new_session=True, **pipes, **project.options())


def test_what_one_machine_has_computed_the_other_takes(
    finished: Finished, tmp_path: Path, folder_store: str
) -> None:
    one, other = machines(tmp_path, folder_store, ratios=[0.3, 0.6])
    # It shares what it has computed before as well.
    shutil.copytree(finished[0].home / "stages", one.home / "stages")
    first = one.frontier()
    second = other.frontier()
    assert second["computed"] == []
    assert second["rows"] == first["rows"]
    assert written(other) == written(one)
    for project in (one, other):
        manifest = project.manifests()["finetune 0.6"]
        model = project.home / "stages" / manifest["key"] / "model.safetensors"
        model.write_bytes(b"damaged")
    damaged = (tmp_path / "store" / "files").glob(
        f"*/{manifest['files']['model.safetensors']['sha256']}"
    )
    assert one.frontier()["computed"] == [], "the store has it"
    next(damaged).write_bytes(b"damaged as well")
    again = other.run("frontier", str(other.params), "--json")
    assert "what is in the store is damaged" in again.stderr
    assert "finetune 0.6" in json.loads(again.stdout)["computed"]
    assert one.frontier()["rows"] == json.loads(again.stdout)["rows"]
    assert written(one) == written(other)


def test_two_machines_at_once_compute_each_stage_once(tmp_path: Path, folder_store: str) -> None:
    both = machines(tmp_path, folder_store)
    running = [start(project) for project in both]
    printed = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    computed = [json.loads(out)["computed"] for out, _ in printed]
    assert not set(computed[0]) & set(computed[1])
    assert set(computed[0]) | set(computed[1]) == set(both[0].manifests())
    assert written(both[0]) == written(both[1])


@pytest.mark.parametrize(
    "address", ["http://nowhere/store", "folder/store", "s3://", "file://not/absolute"]
)
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    project = new_project(tmp_path)
    command = ["frontier", str(project.params), "--set", f"execution.store={address}"]
    assert "execution.store" in project.run(*command, code=2).stderr


def test_a_store_without_a_server_for_all_is_refused(tmp_path: Path, folder_store: str) -> None:
    project = machines(tmp_path, folder_store)[0]
    options = {**project.options(), "capture_output": True}
    del options["env"]["PREFECT_API_URL"]
    refused = subprocess.run(project.command("frontier", str(project.params)), **options)
    assert refused.returncode == 2
    assert "needs a Prefect server that all machines use" in refused.stderr
