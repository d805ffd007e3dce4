"""One stage on several processes, of one machine or of several, by torch's elastic launcher.

One that dies takes the others with it, and all start again from the last finished epoch. Of several
machines one leads: it has the pipeline, announces each of its trainings at
`execution.rendezvous`, and its first process reports and writes. The others take part for as long
as they are there (joining.py); what the stage starts from is sent to them.
"""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from crnn.errors import SettingsError
from crnn.files import write_atomic
from flows.cache import SNAPSHOTS, STATE
from flows.definitions import VERSIONS

Job = dict[str, Any]

LAUNCHER = "CRNN_SLIM_LAUNCHER"
"""Variable that tells a process of several which one launched it."""

RESTARTS = 3
"""How often a group of processes is started again after one has died."""

LOST_SECONDS = 10
"""How long machines wait, before a training and whenever they start again, for the others."""

ANNOUNCED = "crnn-slim"
"""What the job of the training under way is called at the rendezvous."""

ASK_SECONDS = 5
"""How long an answer of the rendezvous may take."""

GIVEN, CHECKPOINT = "given", "checkpoint"
"""Folder of what was sent here; what a job calls the checkpoint that a baseline starts from."""


def launch(job: Job, file: str) -> None:
    """Run a stage on several processes.

    Args:
        job: As flows.worker expects it.
        file: Where it is.

    Raises:
        SettingsError: The address of the rendezvous is not this machine's, or not free.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(job["cpus"])
    # Each group has a store of its own: in one that outlives it, a group that is started again
    # finds the addresses of the last one's processes, and may wait for them for ever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    address, own, store = "127.0.0.1:0", "127.0.0.1", None
    if job["nodes"] > 1:
        address = job["rendezvous"]
        store = announce(job) if job["leads"] else None
        own = _own_address(address)
        _use_interface_of(own)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=job["nodes"],
        nproc_per_node=job["processes"],
        run_id=job["launch"],
        rdzv_backend="c10d",
        rdzv_endpoint=address,
        rdzv_configs={"is_host": job["nodes"] == 1, "last_call_timeout": LOST_SECONDS},
        local_addr=own,
        max_restarts=RESTARTS,
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(job["folder"]) / "launcher")),
    )
    elastic_launch(config, sys.executable)("-P", "-m", "flows.worker", file)
    del store  # Until now the others could meet there.


def announce(job: Job) -> Any:
    """Open the rendezvous, and say there what is to be trained."""
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistNetworkError

    host, port = _split(job["rendezvous"])
    try:
        # Asked like this first: the store itself would try an address that is another machine's.
        socket.create_server((host, port)).close()
        store = TCPStore(host, port, is_master=True, multi_tenant=True, wait_for_workers=False)
    except (OSError, DistNetworkError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            "execution.rendezvous has to be an address of the machine that runs the pipeline, with"
            f" a free port; {job['rendezvous']} cannot be opened here ({reason})"
        ) from error
    store.set(ANNOUNCED, json.dumps({"job": job, "versions": VERSIONS}))
    return store


def announced(rendezvous: str) -> tuple[Job, dict[str, int]] | None:
    """The job that is being trained there, and the versions of the stages; None where none is."""
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistError

    host, port = _split(rendezvous)
    try:
        # Asked like this first: the store itself would try again and again.
        socket.create_connection((host, port), timeout=ASK_SECONDS).close()
        store = TCPStore(host, port, timeout=timedelta(seconds=ASK_SECONDS))
        content = json.loads(store.get(ANNOUNCED))
    except (OSError, DistError):
        return None
    return content["job"], content["versions"]


def _split(rendezvous: str) -> tuple[str, int]:
    """Host and port of an address."""
    host, _, port = rendezvous.rpartition(":")
    return host, int(port)


def _own_address(rendezvous: str) -> str:
    """The address under which this machine speaks with the rendezvous."""
    with socket.create_connection(_split(rendezvous)) as connection:
        return str(connection.getsockname()[0])


def _use_interface_of(address: str) -> None:
    """Have gloo and NCCL talk where the rendezvous is, not where the host's name points to."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (found.address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def share(job: Job, number: int, from_first: Callable[[Any], Any]) -> tuple[Job, Path]:
    """Send the other processes what the first one goes on from, and what the stage starts from.

    Args:
        job: Of this process's machine.
        number: Of this process.
        from_first: Gives every process what the first one has.

    Returns:
        The job and the work folder of this process: that of the stage is the first one's alone.
    """
    folder = Path(job["folder"])
    state = from_first(_state_of(folder) if number == 0 else None)
    given = from_first(_given(job) if number == 0 and job["nodes"] > 1 else {})
    if number == 0:
        return job, folder
    own = folder / f"process-{number}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    for name, content in (state | given).items():
        write_atomic(own / name, content)
    return (job if job["leads"] else _with_files_of(job, own, given)), own


def _state_of(folder: Path) -> dict[str, bytes]:
    """Files of an unfinished training, but for the snapshots, which the first process keeps."""
    files = [folder / STATE, *(folder / "out").rglob("*")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.is_file() and path.parent.name != SNAPSHOTS
    }


def _given(job: Job) -> dict[str, bytes]:
    """Files that a stage starts from, by the names that they get on the other machines."""
    return {f"{GIVEN}/{name}": path.read_bytes() for name, path in _paths(job).items()}


def _paths(job: Job) -> dict[str, Path]:
    paths = {name: Path(upstream["file"]) for name, upstream in job["inputs"].items()}
    return paths | ({CHECKPOINT: Path(job[CHECKPOINT])} if job[CHECKPOINT] else {})


def _with_files_of(job: Job, own: Path, given: dict[str, bytes]) -> Job:
    """A job whose files are those that have been sent here."""
    places = {name.partition("/")[2]: str(own / name) for name in given}
    checkpoint = places.pop(CHECKPOINT, None)
    inputs = {name: {**job["inputs"][name], "file": file} for name, file in places.items()}
    return {**job, "inputs": inputs, CHECKPOINT: checkpoint}
