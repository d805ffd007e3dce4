"""Trainings on several real processes, of one machine and of two: the same training, whatever
becomes of one of them.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from crnn.errors import SettingsError
from flows import group
from flows.servers import free_port
from tests.flows.commands import PATIENCE
from tests.flows.conftest import (
    Project,
    computed,
    copy_of,
    from_nothing,
    new_project,
    wait_for_epoch,
)

FLOAT = {
    "baseline": {"epochs": 3, "batch_size": 15, "precision": "float32"},
    "sparse": {"epochs": 6, "batch_size": 7, "target_ratio": 0.6, "precision": "float32"},
    "finetune": {"epochs": 2, "batch_size": 16, "precision": "float32"},
    "ratios": [0.6],
}
"""Changes: batches that two processes cannot halve, the last one of a single line."""

TOGETHER = {**FLOAT, "execution": {"processes": 2}}


History = dict[str, list[dict[str, float]]]
"""Epochs of every training, by the label of its stage."""


def histories(project: Project) -> History:
    found = {}
    for label, manifest in project.manifests().items():
        path = project.home / "stages" / manifest["key"] / "history.jsonl"
        if path.exists():
            found[label] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def assert_trained_alike(found: History, expected: History) -> None:
    """The losses are the same up to rounding.

    It grows, most where it decides which channel dies first: weights that differ by 1e-7 at the
    start of each training part two runs of one process by 0.9% in the sparse stage.
    """
    for label, tolerance in (("baseline", 2e-4), ("sparse", 3e-2), ("finetune 0.6", 3e-2)):
        losses = [[epoch["train/loss"] for epoch in run[label]] for run in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance), label


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> tuple[Project, Project]:
    """The same experiment on one process and on two."""
    alone = computed(tmp_path_factory, "alone", from_nothing(**FLOAT))
    together = computed(tmp_path_factory, "together", from_nothing(**TOGETHER))
    return alone[0], together[0]


def test_two_processes_train_as_one_does(both: tuple[Project, Project]) -> None:
    alone, together = (histories(project) for project in both)
    assert alone.keys() == together.keys()
    assert_trained_alike(together, alone)
    first = [run["baseline"][0]["train/loss"] for run in (alone, together)]
    assert first[1] == pytest.approx(first[0], rel=1e-4), "before rounding has grown"
    zeros = [run["sparse"][-1]["gamma/share_zero"] for run in (alone, together)]
    assert zeros[0] == zeros[1] >= 0.59
    baselines = [project.manifests()["baseline"]["key"] for project in both]
    assert baselines[0] == baselines[1], "the number of processes is in no key"


def ranks(project: Project) -> list[int]:
    """Processes that train its sparse stage together, in the order of their start."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # It has ended.
        place = str(project.home / "work" / "sparse-").encode()
        if place in command and b"\0RANK=" in environment:
            found.append(int(folder.name))
    return sorted(found)


def before_sparse(finished: Project, folder: Path) -> Project:
    """The finished experiment once more, without its sparse stage."""
    project = copy_of((finished, None), folder)
    shutil.rmtree(project.home / "stages" / project.manifests()["sparse"]["key"])
    return project


def begun(project: Project) -> subprocess.Popen[str]:
    """A pipeline as soon as an epoch of its sparse stage is done; it says into log.txt."""
    command = project.command("frontier", str(project.params))
    with (project.folder / "log.txt").open("w") as log:
        running = subprocess.Popen(command, stderr=log, **project.options())
    wait_for_epoch(running, project.home)
    return running


def test_a_process_that_is_killed_costs_nothing(
    both: tuple[Project, Project], tmp_path: Path
) -> None:
    project = before_sparse(both[1], tmp_path / "killed")
    running = begun(project)
    os.kill(ranks(project)[-1], signal.SIGKILL)
    assert running.wait(PATIENCE) == 0
    assert "sparse: goes on after epoch" in (project.folder / "log.txt").read_text()
    found, expected = (p.manifests()["sparse"]["files"] for p in (project, both[1]))
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["history.jsonl"] != expected["history.jsonl"], "seconds differ"


def test_one_process_finishes_what_two_began(both: tuple[Project, Project], tmp_path: Path) -> None:
    project = before_sparse(both[1], tmp_path / "alone")
    running = begun(project)
    running.terminate()
    assert running.wait(PATIENCE) != 0
    assert ranks(project) == []
    alone = project.run("frontier", str(project.params), "--set", "execution.processes=1")
    assert "sparse: goes on after epoch" in alone.stderr
    losses = [[epoch["train/loss"] for epoch in histories(p)["sparse"]] for p in (project, both[1])]
    assert losses[0][0] == losses[1][0], "an epoch of the two"
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def two_machines(folder: Path) -> tuple[Project, Project]:
    """The machine that leads, and the other one: a state folder each."""
    execution = {"nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}"}
    names = ("leads", "joins")
    first, second = (new_project(folder / n, **FLOAT, execution=execution) for n in names)
    return first, second


@contextmanager
def training_along(project: Project, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A machine that joins, and is told to leave at the end."""
    command = project.command("join", str(project.params))
    with log.open("w") as out:
        joined = subprocess.Popen(command, stderr=out, **project.options())
    try:
        yield joined
    finally:
        joined.terminate()
        joined.wait(PATIENCE)


def test_two_machines_train_as_one_does(both: tuple[Project, Project], tmp_path: Path) -> None:
    first, second = two_machines(tmp_path)
    logs = [tmp_path / "lost", tmp_path / "back"]
    with training_along(second, logs[0]) as lost:
        running = begun(first)
        lost.kill()
    with training_along(second, logs[1]) as back:
        assert running.wait(PATIENCE) == 0
    assert lost.returncode == -signal.SIGKILL
    assert "sparse: on 2 processes" in logs[0].read_text()
    assert back.returncode == 0
    assert "on 2 processes" in logs[1].read_text(), "it trained along once more"
    assert "the others go on" in logs[1].read_text()
    found, expected = histories(first), histories(both[0])
    assert_trained_alike(found, expected)


def test_the_machine_that_leads_has_the_rendezvous(tmp_path: Path) -> None:
    project = two_machines(tmp_path)[0]
    elsewhere = "execution.rendezvous=192.0.2.1:29400"
    refused = project.run("frontier", str(project.params), "--set", elsewhere, code=2)
    assert "192.0.2.1:29400 cannot be opened here" in refused.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    group._refuse_more_than_gpus(2)
    with pytest.raises(SettingsError, match=r"processes is 3 .* this machine has 2: set it to 2"):
        group._refuse_more_than_gpus(3)


def test_a_machine_with_other_samples_does_not_join(tmp_path: Path) -> None:
    first, second = two_machines(tmp_path)
    command = first.command("frontier", str(first.params))
    leads = subprocess.Popen(command, **first.options())
    refused = second.run("join", str(second.params), "--set", "data.train=40", code=2)
    assert "are not those of the machine that leads" in refused.stderr
    leads.terminate()
    assert leads.wait(PATIENCE) != 0
