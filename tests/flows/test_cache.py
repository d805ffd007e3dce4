"""Keys, proof at a hit, and locks between processes that really exist."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from crnn.errors import StoppedError
from flows import cache, project, running
from flows.cache import Manifest, Stage
from flows.experiment import Experiment
from flows.locks import seats, single_flight
from flows.store import StoreError
from tests.flows.conftest import TINY


def stage(**settings: object) -> Stage:
    return Stage("baseline", "baseline", dict(settings), {}, 1)


def publish(settings: dict[str, object]) -> Manifest:
    """A finished stage of two small files."""
    made = stage(**settings)
    out = project.work_folder() / made.key / "out"
    (out / "sub").mkdir(parents=True)
    (out / "model.bin").write_bytes(b"weights")
    (out / "sub" / "more.txt").write_text("more")
    outcome = {"result": "model.bin", "metrics": {"val/word_accuracy": 0.5}, "seconds": 1.0}
    return cache.publish(made, out, outcome, "run", print)


def test_keys_depend_on_settings_inputs_and_version_and_have_no_dots() -> None:
    upstream = publish({"epochs": 1})
    keys = {
        stage(ratio=0.62).key,
        stage(ratio=0.67).key,
        Stage("baseline", "baseline", {"ratio": 0.62}, {}, 2).key,
        Stage("prune", "baseline", {"ratio": 0.62}, {}, 1).key,
        Stage("baseline", "baseline", {"ratio": 0.62}, {"sparse": upstream}, 1).key,
    }
    assert len(keys) == 5
    assert not any("." in key for key in keys)
    assert Stage("baseline", "another label", {"ratio": 0.62}, {}, 1).key == stage(ratio=0.62).key


def test_a_published_stage_is_found() -> None:
    manifest = publish({"epochs": 1})
    found = cache.find(manifest.key, pytest.fail)
    assert found == manifest
    assert found.file("model.bin").read_bytes() == b"weights"


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.bin").read_bytes())
    content[3] ^= 1
    (folder / "model.bin").write_bytes(content)


def lie_about_the_digest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.bin"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flatter_the_figures(folder: Path) -> None:
    written = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(written.replace("0.5", "0.7"))


def swap_the_manifest(folder: Path) -> None:
    other = publish({"epochs": 2}).folder
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.bin").unlink(), "model.bin is missing"),
        (
            lambda folder: (folder / "sub" / "more.txt").write_text("mor"),
            "more.txt has other bytes",
        ),
        (flip_a_bit, "model.bin has other bytes"),
        (lie_about_the_digest, "the manifest has other bytes"),
        (flatter_the_figures, "the manifest has other bytes"),
        (swap_the_manifest, "of another stage"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest unreadable"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest unreadable"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest unreadable"),
    ],
)
def test_damage_is_found_set_aside_and_said(damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    manifest = publish({"epochs": 1})
    damage(manifest.folder)
    said: list[str] = []
    assert cache.find(manifest.key, said.append) is None
    assert len(said) == 1
    assert manifest.key in said[0]
    assert reason in said[0]
    assert not manifest.folder.exists()
    kept = list(project.set_aside_folder().iterdir())
    assert len(kept) == 1
    assert (kept[0] / "sub" / "more.txt").exists()
    assert publish({"epochs": 1}).key == manifest.key


HOLD = """
import sys, time
from flows.locks import single_flight
with single_flight(sys.argv[1], lambda: False, print):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(key: str) -> subprocess.Popen[str]:
    """Another process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, key], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_waiter_says_for_whom_and_takes_over_when_the_holder_is_killed() -> None:
    said: list[str] = []
    with holder("k") as other:

        def log(message: str) -> None:
            said.append(message)
            other.send_signal(signal.SIGKILL)

        begun = time.monotonic()
        with single_flight("k", lambda: False, log):
            assert time.monotonic() - begun < 5
    assert said == [f"k: waiting for process {other.pid} on {os.uname().nodename}"]


def test_a_wait_can_be_stopped() -> None:
    with holder("k") as other:
        with (
            pytest.raises(Exception, match="stopped while waiting"),
            single_flight("k", lambda: True, lambda _: None),
        ):
            pytest.fail("the lock is held by another process")
        other.kill()


def test_a_damaged_copy_of_what_a_worker_finished_is_not_believed() -> None:
    manifest = publish({"epochs": 1})
    running.bring(manifest, pytest.fail)
    (manifest.folder / "model.bin").write_bytes(b"damaged")
    said: list[str] = []
    with pytest.raises(StoreError, match="is gone from the store; run again"):
        running.bring(manifest, said.append)
    assert "set aside" in said[0]


@pytest.mark.parametrize(
    ("cores", "parallel", "expected"),
    [(16, 3, 3), (8, 3, 3), (4, 3, 3), (2, 3, 2), (4, "auto", 4), (5, "auto", 2), (7, "auto", 3)],
)
def test_as_many_trainings_at_once_as_the_experiment_says(
    cores: int, parallel: int | str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "cores", lambda: list(range(cores)))
    experiment = Experiment.model_validate({**TINY, "execution": {"parallel": parallel}})
    parallel = running.parallel_finetunes(experiment)
    assert parallel == expected
    count, shared = running.shares(parallel)
    with ExitStack() as held:
        for _ in range(expected):
            held.enter_context(seats(count, shared, lambda: False, pytest.fail))
        with pytest.raises(StoppedError), seats(count, shared, lambda: True, lambda said: None):
            pass


def test_cores_are_shared_and_a_whole_machine_waits_for_all_of_them() -> None:
    with holder("seat-0") as other:
        with seats(1, [0, 1], lambda: False, pytest.fail):
            said: list[str] = []
            with (
                pytest.raises(Exception, match="stopped while waiting"),
                seats(1, [0, 1], lambda: True, said.append),
            ):
                pytest.fail("both cores are taken")
        with (
            pytest.raises(Exception, match="stopped while waiting"),
            seats(2, [0, 1], lambda: True, said.append),
        ):
            pytest.fail("one core is taken")
        with seats(1, [1], lambda: False, pytest.fail):
            pass  # A pipeline that was given the other core waits for none.
        computes = f"process {other.pid} on {os.uname().nodename} computes"
        assert said == [f"waiting for a free core; {computes}"] * 2
        other.kill()
    with seats(2, [0, 1], lambda: False, pytest.fail):
        pass
