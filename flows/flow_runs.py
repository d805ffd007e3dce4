"""What Prefect and a running pipeline tell each other: a cancel, and the death of earlier runs."""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows import children, project
from flows.locks import is_free, single_flight

WATCH_SECONDS = 2
"""How often Prefect is asked whether the run was cancelled there."""


@contextmanager
def attended() -> Iterator[None]:
    """Within a flow: mark the dead runs before it, and stop its children when it is cancelled."""
    run_id = UUID(flow_run.id)
    with single_flight(_lock_of(run_id)):
        with suppress(Exception), get_client(sync_client=True) as client:
            # What Prefect's pages show is worth no failed run.
            client.update_flow_run(run_id, tags=[project.identity()])
            _mark_dead_runs(client)
        done = threading.Event()
        context = contextvars.copy_context()  # Prefect keeps its settings there.
        arguments = (_watch_for_cancel, run_id, done)
        threading.Thread(target=context.run, args=arguments, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            (project.locks_folder() / f"{_lock_of(run_id)}.lock").unlink()


def _lock_of(run_id: UUID) -> str:
    return f"flow-{run_id}"


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


def _watch_for_cancel(run_id: UUID, done: threading.Event) -> None:
    """Stop the children when the run is cancelled in Prefect, which cannot interrupt a flow."""
    with get_client(sync_client=True) as client:
        while not done.wait(WATCH_SECONDS):
            with suppress(Exception):  # A server that is away cancels nothing.
                state = client.read_flow_run(run_id).state
                if state and (state.is_cancelling() or state.is_cancelled()):
                    children.stop()
