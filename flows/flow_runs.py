"""What Prefect and a running pipeline tell each other: cancels, progress, deaths."""

import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows import project
from flows.forecast import Forecast
from flows.locks import FLOW, is_free, single_flight

WATCH_SECONDS = 2
"""How often Prefect is asked whether the run was cancelled there."""

SHOW_EVERY = 5
"""Questions of that kind before it is told of the progress once."""


@contextmanager
def attended(experiment: str, forecast: Forecast, stop: threading.Event) -> Iterator[None]:
    """Within a flow: mark the dead runs before it, show how far it is, stop it when cancelled.

    Args:
        experiment: Its name.
        forecast: Of the run.
        stop: Set when the run is cancelled.
    """
    run_id = UUID(flow_run.id)
    with single_flight(_lock_of(run_id)):
        with suppress(Exception), get_client(sync_client=True) as client:
            # What Prefect's pages show is worth no failed run.
            client.update_flow_run(run_id, tags=[project.identity()])
            _mark_dead_runs(client)
        progress = _Progress(artifact_key("progress", experiment), forecast)
        try:
            with watched(stop, progress.show):
                yield
            progress.show()
        finally:
            (project.locks_folder() / f"{_lock_of(run_id)}.lock").unlink()


@contextmanager
def watched(stop: threading.Event, show: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within a flow, or a task of one: set stop when the run is cancelled or over.

    Prefect itself ends neither the threads of a run nor the tasks on other machines.

    Args:
        stop: Set when nothing may go on.
        show: Called from time to time.
    """
    done = threading.Event()
    context = contextvars.copy_context()  # Prefect keeps its settings there.
    arguments = (_watch, UUID(flow_run.id), stop, done, show)
    watcher = threading.Thread(target=context.run, args=arguments, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(WATCH_SECONDS)  # What it shows now is older than what is shown next.


def _lock_of(run_id: UUID) -> str:
    return f"{FLOW}{run_id}"


def _mark_dead_runs(client: SyncPrefectClient) -> None:
    """A pipeline that is killed stays Running in Prefect: its lock, free again, tells."""
    running = FlowRunFilter.model_validate(
        {"state": {"type": {"any_": ["RUNNING"]}}, "tags": {"all_": [project.identity()]}}
    )
    for run in client.read_flow_runs(flow_run_filter=running):
        if is_free(_lock_of(run.id)):
            message = "The process of this run died; the same command goes on from its last epoch."
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
            (project.locks_folder() / f"{_lock_of(run.id)}.lock").unlink()


def _watch(
    run_id: UUID, stop: threading.Event, done: threading.Event, show: Callable[[], None]
) -> None:
    with get_client(sync_client=True) as client:
        for asked in itertools.count(1):
            if done.wait(WATCH_SECONDS):
                return
            with suppress(Exception):  # A server that is away cancels nothing.
                state = client.read_flow_run(run_id).state
                if state and (state.is_cancelling() or state.is_final()):
                    stop.set()
            if asked % SHOW_EVERY == 0:
                show()


class _Progress:
    """The progress artifact of a run; a server that is away is not told."""

    def __init__(self, key: str, forecast: Forecast) -> None:
        self._key, self._forecast = key, forecast
        self._shown = ""
        self._artifact: UUID | None = None

    def show(self) -> None:
        """Bring it up to date, where anything has changed."""
        with suppress(Exception):
            text, (done, of) = self._forecast.report(), self._forecast.stages
            if text == self._shown:
                return
            if self._artifact is None:
                made = create_progress_artifact(100 * done / of, self._key, text)
                self._artifact = cast(UUID, made)  # A coroutine in async code alone.
            else:
                update_progress_artifact(self._artifact, 100 * done / of, text)
            self._shown = text


def artifact_key(what: str, experiment: str) -> str:
    """Key of one of an experiment's artifacts, which may have small letters and dashes alone."""
    return f"{what}-{experiment.lower().replace('_', '-')}"
