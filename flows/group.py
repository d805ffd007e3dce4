"""One stage on several processes, of one machine or of several, by torch's elastic launcher.

One that dies takes the others with it, and all start again from the last finished epoch. Of several
machines one leads: it has the pipeline, announces each of its trainings at
`execution.rendezvous`, and its first process reports and writes. The others take part for as long
as they are there (joining.py); what the stage starts from is sent to them.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from crnn.errors import SettingsError
from crnn.files import write_atomic
from flows.cache import SNAPSHOTS, STATE, finished_epochs
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
        SettingsError: More processes than this machine has GPUs, where it has any; or the address
            of the rendezvous is not this machine's, or not free.
    """
    _refuse_more_than_gpus(job["processes"])
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(job["cpus"])
    # Each group has a store of its own: in one that outlives it, a group that is started again
    # finds the addresses of the last one's processes, and may wait for them for ever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if job["nodes"] == 1:
        _launch_once(job, file, "127.0.0.1:0", "127.0.0.1")
    elif job["leads"]:
        _lead(job, file)
    else:
        own = _own_address(job["rendezvous"])
        _use_interface_of(own)
        _launch_once(job, file, job["rendezvous"], own)


def _refuse_more_than_gpus(processes: int) -> None:
    """NCCL hangs or fails where two processes of a group share a GPU."""
    import torch

    if 0 < (gpus := torch.cuda.device_count()) < processes:
        raise SettingsError(
            f"execution.processes is {processes} and each needs a GPU of its own; this machine has"
            f" {gpus}: set it to {gpus} at most"
        )


def _lead(job: Job, file: str) -> None:
    """Train with whoever joins, again and again until it is done.

    Every machine that goes costs the launcher one of its restarts, and one that fails for good
    ends it: so it ends for good itself only when epochs no longer get done.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    store = _open_rendezvous(job["rendezvous"])
    own = _own_address(job["rendezvous"])
    _refuse_loopback(job["rendezvous"], own)
    _use_interface_of(own)
    out = Path(job["folder"]) / "out"
    failures, seen = 0, finished_epochs(out)
    while True:
        announced = {**job, "launch": f"{job['launch']}-{time.time_ns()}"}
        store.set(ANNOUNCED, json.dumps({"job": announced, "program": program()}))
        try:
            _launch_once(announced, file, job["rendezvous"], own)
            return
        except SignalException:
            raise
        except Exception:
            epochs = finished_epochs(out)
            failures = 1 if epochs > seen else failures + 1
            seen = epochs
            if failures > RESTARTS:
                raise
            traceback.print_exc()


def _launch_once(job: Job, file: str, rendezvous: str, own: str) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=job["nodes"],
        nproc_per_node=job["processes"],
        run_id=job["launch"],
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous,
        rdzv_configs={"is_host": job["nodes"] == 1, "last_call_timeout": LOST_SECONDS},
        local_addr=own,
        max_restarts=RESTARTS,
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(job["folder"]) / "launcher")),
    )
    elastic_launch(config, sys.executable)("-P", "-m", "flows.worker", file)


def _open_rendezvous(rendezvous: str) -> Any:
    """The store at which the machines meet, for as long as it is referred to."""
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistNetworkError

    host, port = _split(rendezvous)
    try:
        # Asked like this first: the store itself would try an address that is another machine's.
        socket.create_server((host, port)).close()
        return TCPStore(host, port, is_master=True, multi_tenant=True, wait_for_workers=False)
    except (OSError, DistNetworkError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            "execution.rendezvous has to be an address of the machine that runs the pipeline, with"
            f" a free port; {rendezvous} cannot be opened here ({reason})"
        ) from error


def _refuse_loopback(rendezvous: str, own: str) -> None:
    """Of a name that leads nowhere but here, others would be told, and not find it."""
    host = _split(rendezvous)[0]
    if own.startswith("127.") and host != "localhost" and not host.startswith("127."):
        raise SettingsError(
            f"execution.rendezvous: {host} is {own} on this machine, where no other one reaches it;"
            " give the address of the network that they share"
        )


def program() -> dict[str, str]:
    """What has to be the same on all machines of a group."""
    import torch

    from crnn.devices import best_device

    stages = hashlib.sha256(json.dumps(VERSIONS, sort_keys=True).encode()).hexdigest()[:12]
    version = torch.__version__.partition("+")[0]
    return {"stages": stages, "torch": version, "device": best_device().type}


def announced(rendezvous: str) -> tuple[Job, dict[str, str]] | None:
    """The job that is being trained there, and the leader's program(); None where none is."""
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
    return content["job"], content["program"]


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
