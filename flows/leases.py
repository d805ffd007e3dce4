"""One computation of a stage at a time over all machines that share a store and a Prefect server.

A lease is a slot of a global concurrency limit of Prefect's. It is renewed while its holder lives
and runs out LEASE_SECONDS after it has died. A holder that was only cut off may come back late: the
store then has what the next one made, and keeps that.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency

from crnn.errors import StoppedError
from flows import store

LEASE_SECONDS = 60
"""The shortest that Prefect allows."""

ASK_SECONDS = 5


@contextmanager
def lease(key: str, stopping: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease on a stage; while another machine holds it, wait and say so.

    Without a store nothing is shared, and nothing is held.

    Raises:
        StoppedError: The pipeline was told to stop while it waited.
    """
    if not store.is_shared():
        yield
        return
    name = f"crnn-slim {key}"
    with ExitStack() as held:
        told = False
        while not _took(held, name):
            if not told:
                say(f"{key}: waiting for another machine")
                told = True
            if stopping():
                raise StoppedError(f"stopped while waiting for {key}")
        try:
            yield
        finally:
            # While it is held: who waits makes a new one, and nobody loses one just taken.
            with suppress(Exception), get_client(sync_client=True) as client:
                client.delete_global_concurrency_limit_by_name(name)


def _took(held: ExitStack, name: str) -> bool:
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, 1)
    slot = concurrency(
        name,
        timeout_seconds=ASK_SECONDS,
        lease_duration=LEASE_SECONDS,
        strict=True,
        raise_on_lease_renewal_failure=False,  # The store takes no second result.
    )
    # The one who held it may have deleted it since; a server that is away fails above.
    with suppress(TimeoutError, ConcurrencySlotAcquisitionError):
        held.enter_context(slot)
        return True
    return False
