"""What all stages share: the job, the samples, the model file, the clock."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torchinfo import summary

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, save_checkpoint
from crnn.data.batches import Lines
from crnn.data.images import HEIGHT
from crnn.data.render import generator
from crnn.data.sources import open_source
from crnn.devices import best_device, describe
from crnn.errors import PassingError
from crnn.files import sha256, write_atomic
from crnn.networks.recogniser import Recogniser
from crnn.settings import DataSettings
from flows import project
from flows.cache import HISTORY, SUMMARY, history
from pruning.cost import LINE_WIDTH

Event = dict[str, Any]

READING = "reading"
"""Entry of the data stage's index of the usable samples that tells how to read them."""

ON_CPU = ("export", "int8", "judge", "measure", "latency")
"""Stages that compute there, also where there is a GPU."""

MAX_LOADERS = 8
"""Loader processes that one GPU can want; each keeps a few batches in shared memory."""

Outcome = tuple[str, dict[str, float]]
"""Name of the file that later stages read, and the final figures."""


@dataclass(frozen=True)
class Work:
    """A stage under way.

    Attributes:
        job: As the parent wrote it: settings, upstream result files, cores.
        folder: Resumable state.
        out: Files of the finished stage.
        emit: Sends a progress event to the parent.
    """

    job: dict[str, Any]
    folder: Path
    out: Path
    emit: Callable[[Event], None]

    @property
    def settings(self) -> dict[str, Any]:
        """All that shapes the result."""
        settings: dict[str, Any] = self.job["settings"]
        return settings

    @property
    def data(self) -> DataSettings:
        """Where the samples are."""
        return DataSettings.model_validate(self.job["data"])

    @property
    def seed(self) -> int:
        """Of data order and augmentation."""
        return seed_of(self.job["stage"], self.settings["seed"])

    def input(self, stage: str) -> Path:
        """Result file of an upstream stage, proven again: time has passed since it was found.

        Raises:
            PassingError: Its bytes are not those that this stage's key was made of.
        """
        upstream = self.job["inputs"][stage]
        return proven(Path(upstream["file"]), upstream["sha256"])

    def lines(self, split: str) -> Lines:
        """The usable samples of a split, as the data stage indexed them."""
        charset, max_width = self._reading()
        return Lines(
            source=open_source(self.data, split, self.job["seed"]),
            indices=self._indexed(f"{split}_indices"),
            widths=self._indexed(f"{split}_widths"),
            charset=charset,
            max_width=max_width,
            workers=_cores(self.job)[1],
        )

    def _indexed(self, name: str) -> np.ndarray:
        """One array of the data stage's, left on the disk until it is read."""
        with safe_open(self.input("data"), "pt") as index:
            array: np.ndarray = index.get_tensor(name).numpy()
            return array

    def _reading(self) -> tuple[Charset, int]:
        """Charset and widest line in pixels, as the data stage found them."""
        with safe_open(self.input("data"), "pt") as index:
            reading = json.loads(index.metadata()[READING])
        return Charset(reading["charset"]), reading["max_width"]

    def unseen(self) -> set[int]:
        """Val samples whose label does not occur in train."""
        return set(self._indexed("val_unseen").tolist())

    def save_model(self, path: Path, model: Recogniser) -> None:
        """Write a checkpoint with the charset and geometry of the data."""
        save_checkpoint(path, self.checkpoint(model, self.job["stage"]))

    def checkpoint(self, model: Recogniser, stage: str) -> Checkpoint:
        """A network with the charset and geometry of the data, as a stage would save it."""
        return Checkpoint(model, *self._reading(), stage)

    def seconds_before(self) -> float:
        """What the epochs took that earlier attempts finished.

        Raises:
            PassingError: Their records are damaged; all they left is set aside.
        """
        try:
            return sum(float(record["train/seconds"]) for record in history(self.out))
        except (ValueError, KeyError, TypeError) as error:
            raise self.anew(f"{self.out / HISTORY} is damaged ({error})") from error

    def anew(self, reason: str) -> PassingError:
        """Set aside what earlier attempts left, and say so."""
        aside = project.set_aside(self.folder)
        return PassingError(f"{reason}; set aside as {aside}, run again to start this stage anew")

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the finished stage."""
        write_atomic(self.out / name, json.dumps(value, indent=1).encode())

    def write_summary(self, model: Recogniser) -> None:
        """Write torchinfo's table of the network."""
        shape = (1, 3, HEIGHT, LINE_WIDTH)
        table = summary(model, shape, device="cpu", verbose=0, depth=3)
        write_atomic(self.out / SUMMARY, f"{table}\n".encode())


def seed_of(stage: str, seed: int) -> int:
    """Seed of data order and augmentation, another for each kind of stage.

    With one for all, fine-tuning would begin with the very images that the baseline began with, and
    8 bits would be judged by lines that the network has learnt.

    Args:
        stage: Kind of stage.
        seed: Of the experiment.
    """
    return int(generator(seed, *stage.encode()).integers(2**63))


@cache
def proven(path: Path, digest: str) -> Path:
    """The path, once its bytes have been hashed in this process.

    Raises:
        PassingError: The file is missing or has other bytes.
    """
    if not path.is_file() or sha256(path) != digest:
        raise PassingError(f"{path} was changed or removed while the pipeline ran; run again")
    return path


def run_timed(work: Work, stage: Callable[[Work], Outcome], seconds_before: float) -> Event:
    """Compute a stage on its share of the cores, and describe where it ran.

    Args:
        work: The stage's job and folders.
        stage: What to compute.
        seconds_before: Time that earlier attempts put in.

    Returns:
        `result`, `metrics` and `seconds`, for the manifest.
    """
    begun = time.perf_counter()
    torch.set_num_threads(_cores(work.job)[0])
    result, metrics = stage(work)
    work.write_json("settings.json", work.settings)
    work.write_json("environment.json", _environment())
    seconds = round(seconds_before + time.perf_counter() - begun, 3)
    return {"result": result, "metrics": metrics, "seconds": seconds}


def _cores(job: dict[str, Any]) -> tuple[int, int]:
    """Threads of the computation, and loader processes, out of the job's cores.

    On a CPU a loader that competes with training costs more than it gives, so that few cores
    have none. Where a GPU computes the cores have nothing else to do.
    """
    cpus, workers = job["cpus"], job["loader_workers"]
    if workers == "auto":
        on_gpu = torch.cuda.is_available() and job["stage"] not in ON_CPU
        workers = min(cpus - 1, MAX_LOADERS) if on_gpu else cpus // 4
    return max(1, cpus - workers), workers


def _environment() -> dict[str, Any]:
    packages = ("torch", "onnxruntime", "numpy", "pillow", "safetensors", "prefect", "mlflow")
    return {
        "git_commit": project.git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": project.processor(),
        "device": describe(best_device()),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        **{name: version(name) for name in packages},
    }
