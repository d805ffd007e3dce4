"""One computation of a stage at a time over all machines that share a store and a Prefect server.

A lease is the only slot of a global concurrency limit of Prefect's, named after the stage. It is
renewed for as long as its holder lives and reaches the server, and runs out LEASE_SECONDS after the
last time. A holder that lost it computes on; the store then has what the next one made, or this
one, whichever was first.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from crnn.errors import StoppedError, Stopping
from flows import store

LEASE_SECONDS = 60
"""The shortest that Prefect allows."""

RENEW_SECONDS = 15
ASK_SECONDS = 2


@contextmanager
def lease(key: str, stopping: Stopping, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease on a stage; while another machine holds it, wait and say so.

    Without a store nothing is shared, and nothing is held.

    Raises:
        StoppedError: The pipeline was told to stop while it waited.
    """
    if not store.is_shared():
        yield
        return
    name = f"crnn-slim {key}"
    with get_client(sync_client=True) as client:
        held, told = _taken(client, name), False
        while held is None:
            if not told:
                say(f"{key}: waiting for another machine")
                told = True
            if stopping():
                raise StoppedError(f"stopped while waiting for {key}")
            time.sleep(ASK_SECONDS)
            held = _taken(client, name)
    done = threading.Event()
    context = contextvars.copy_context()  # Prefect keeps its settings there.
    renewing = threading.Thread(target=context.run, args=(_renew, held, done), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        _give_back(held, name)


def _taken(client: SyncPrefectClient, name: str) -> UUID | None:
    """The lease, where nobody else has it."""
    # Another machine may make the limit at the same time, or delete it in between.
    with suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(name, 1)
    try:
        answer = client.increment_concurrency_slots_with_lease(
            [name], 1, "concurrency", LEASE_SECONDS
        )
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        raise
    given = answer.json()
    return UUID(given["lease_id"]) if given["limits"] else None


def _renew(held: UUID, done: threading.Event) -> None:
    """Renew the lease again and again; a server that is away may be back before it has run out."""
    with get_client(sync_client=True) as client:
        while not done.wait(RENEW_SECONDS):
            with suppress(Exception):
                client.renew_concurrency_lease(held, LEASE_SECONDS)


def _give_back(held: UUID, name: str) -> None:
    """Delete the limit and the lease on it. One that ran out may be another machine's by now."""
    with suppress(Exception), get_client(sync_client=True) as client:
        client.renew_concurrency_lease(held, LEASE_SECONDS)  # Refused where it has run out.
        with suppress(ObjectNotFound):
            client.delete_global_concurrency_limit_by_name(name)
        client.release_concurrency_slots_with_lease(held)
