"""A machine that trains along with the one that runs the pipeline."""

import os
import shutil
import signal
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

from crnn.errors import SettingsError, StoppedError, UserError
from flows import children, definitions, display, group, project
from flows.children import ChildDiedError
from flows.experiment import Experiment
from flows.locks import seats, single_flight

JOINED = "joined"
"""Work folder and lock of a training that another machine leads."""

POLL_SECONDS = 1

DEATHS = 2
"""After so many in one training this machine leaves the rest of it to the others."""


def join(experiment: Experiment) -> None:
    """Take part in each training that is announced at the rendezvous, until interrupted.

    Args:
        experiment: Its data, and how to use this machine; what is trained, the other one says.

    Raises:
        SettingsError: There is no rendezvous in the settings, or the machines do not fit together:
            they have other data, or another version of this program.
    """
    rendezvous = experiment.execution.rendezvous
    if rendezvous is None:
        raise SettingsError(
            "join needs execution.nodes and execution.rendezvous in the params file"
        )
    project.configure_environment()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    over: set[str] = set()
    died: Counter[str] = Counter()
    waiting = False
    while not stop.wait(POLL_SECONDS):
        found = group.announced(rendezvous)
        if found is None or found[0]["launch"] in over or died[_key(found[0])] >= DEATHS:
            if not waiting:
                display.say(f"waiting for a training at {rendezvous}")
            waiting = True
            continue
        job, waiting = found[0], False
        _refuse_other(*found, definitions.data_stage(experiment).key)
        with suppress(StoppedError):
            try:
                _take_part(experiment, job, rendezvous, stop)
                over.add(job["launch"])
            except ChildDiedError as error:
                display.say(f"{job['label']}: left the others, or lost them ({error})")
                died[_key(job)] += group.announced(rendezvous) is not None
    shutil.rmtree(project.work_folder() / JOINED, ignore_errors=True)
    display.say("no longer training along; the others go on")


def _key(job: group.Job) -> str:
    """Of the stage."""
    return Path(job["folder"]).name


def _refuse_other(job: group.Job, program: dict[str, str], data: str) -> None:
    own = group.program()
    if different := [name for name in own if own[name] != program.get(name)]:
        theirs, ours = (
            ", ".join(f"{name} {of[name]}" for name in different) for of in (program, own)
        )
        raise SettingsError(f"the machine that leads has {theirs}, and this one {ours}")
    if job["inputs"]["data"]["key"] != data:
        raise SettingsError(
            f"the samples here ({data}) are not those of the machine that leads"
            f" ({job['inputs']['data']['key']}); data.root and the rest of the data section must"
            " name the same"
        )


def _take_part(
    experiment: Experiment, job: group.Job, rendezvous: str, stop: threading.Event
) -> None:
    """Train along until the training is over.

    Raises:
        ChildDiedError: It went on without this machine, or the one that leads is gone.
        StoppedError: stop was set.
    """
    execution, allowed = experiment.execution, project.cores()
    folder = project.work_folder() / JOINED
    with (
        single_flight(JOINED, stop.is_set, display.say) as lock,
        seats(len(allowed), allowed, stop.is_set, display.say),
    ):
        now = group.announced(rendezvous)
        if now is None or now[0]["launch"] != job["launch"]:
            return  # It is over: this machine had something else to do.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        own = {
            **job,
            "data": experiment.data.model_dump(mode="json"),
            "folder": str(folder),
            "rendezvous": rendezvous,
            "cpus": max(1, len(allowed) // execution.processes),
            "processes": execution.processes,
            "loader_workers": execution.loader_workers,
            "leads": False,
            "parent": os.getpid(),
        }
        display.say(f"{job['label']}: training along, {execution.processes} processes here")
        try:
            children.run_child(own, lock, partial(display.show, job["label"]), stop)
        except StoppedError:
            raise
        except UserError as error:
            display.say(f"{job['label']}: {error}")
        finally:
            display.end(job["label"])
        shutil.rmtree(folder, ignore_errors=True)  # Of one that died the log stays.
