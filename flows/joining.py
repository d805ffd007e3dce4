"""A machine that trains along with the one that runs the pipeline."""

import os
import shutil
import signal
import threading
from contextlib import suppress
from functools import partial

from crnn.errors import SettingsError, StoppedError, UserError
from flows import children, definitions, display, group, project
from flows.children import ChildDiedError
from flows.experiment import Experiment
from flows.locks import seats, single_flight
from flows.running import cores

JOINED = "joined"
"""Work folder and lock of a training that another machine leads."""

POLL_SECONDS = 1


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
    data = definitions.data_stage(experiment).key
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    finished, waiting = "", False
    while not stop.wait(POLL_SECONDS):
        found = group.announced(rendezvous)
        if found is None or found[0]["launch"] == finished:
            if not waiting:
                display.say(f"waiting for a training at {rendezvous}")
            waiting = True
            continue
        job, versions = found
        _refuse_other(job, versions, data)
        with suppress(StoppedError):
            if _take_part(experiment, job, stop):
                finished = job["launch"]
        waiting = False
    display.say("no longer training along; the others go on")


def _refuse_other(job: group.Job, versions: dict[str, int], data: str) -> None:
    if versions != definitions.VERSIONS:
        raise SettingsError(
            "the machine that leads has another version of this program; install the same on both"
        )
    if job["inputs"]["data"]["key"] != data:
        raise SettingsError(
            f"the samples here ({data}) are not those of the machine that leads"
            f" ({job['inputs']['data']['key']}); data.root and the rest of the data section must"
            " name the same"
        )


def _take_part(experiment: Experiment, job: group.Job, stop: threading.Event) -> bool:
    """Train along; whether the training came to its end, as far as it can be seen from here."""
    execution, total = experiment.execution, cores()
    folder = project.work_folder() / JOINED
    with (
        single_flight(JOINED, log=display.say) as lock,
        seats(total, total, stop.is_set, display.say),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        own = {
            **job,
            "data": experiment.data.model_dump(mode="json"),
            "folder": str(folder),
            "cpus": max(1, total // execution.processes),
            "processes": execution.processes,
            "loader_workers": execution.loader_workers,
            "leads": False,
            "parent": os.getpid(),
        }
        display.say(f"{job['label']}: training along, {execution.processes} processes here")
        try:
            children.run_child(own, lock, partial(display.show, job["label"]), stop)
        except ChildDiedError:
            display.say(f"{job['label']}: lost the others; see {folder / 'worker.log'}")
            return False
        except StoppedError:
            raise
        except UserError as error:
            display.say(f"{job['label']}: {error}")
        finally:
            display.end(job["label"])
        return True
