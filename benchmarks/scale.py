"""What millions of lines cost: time, throughput and memory, and what a second process gives.

    .venv/bin/python -m benchmarks.scale [10000 100000 2000000]

Builds an LMDB of so many small lines (a thousand are rendered, and written again and again) in a
temporary folder. In processes of their own it measures the first look at the data (fingerprint, and
every line decoded and checked), what a later run needs to see that nothing has changed, and the
beginning of a shuffled, augmented epoch. Memory is the most that the process had beside what it has
after its imports, without the pages of files, which the system keeps as long as it likes. At
the end a VGG13 of full width trains on one core, and on two processes with a core each.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import lmdb
from safetensors import safe_open
from safetensors.numpy import save_file

from crnn.charset import Charset
from crnn.data.batches import Lines, training_batches
from crnn.data.check import check_splits
from crnn.data.render import render_line
from crnn.data.sources import Lmdb, open_source
from crnn.networks.vgg import STRIDE
from crnn.settings import DataSettings, TextSettings, TrainSettings

SIZES = (10_000, 100_000, 2_000_000)
DIFFERENT = 1_000
BATCHES = 200
MAX_WIDTH = 160
INDEX = "lines.safetensors"
TEXT = TextSettings(alphabet="0123456789", min_length=3, max_length=6)
TRAINED = {
    "data.train": 768,
    "data.val": 16,
    "model.width": 1,
    "baseline.epochs": 2,
    "sparse.epochs": 1,
    "finetune.epochs": 0,
    "ratios": [0.5],
    "export": "null",
}


def main() -> None:
    """Measure each number of lines, then one process and two."""
    if sys.argv[1:2] == ["case"]:
        step = {"look": _look, "epoch": _epoch}[sys.argv[2]]
        print(json.dumps(step(Path(sys.argv[3]))))
        return
    header = ["lines", "LMDB", "first look", "its memory", "later", "epoch begins after"]
    header += ["lines/s", "its memory"]
    print("|", " | ".join(header), "|")
    print("|", " | ".join(["--:"] * len(header)), "|")
    for size in [int(size) for size in sys.argv[1:]] or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            _build(Path(folder) / "lines", size)
            found = {**_measured("look", folder), **_measured("epoch", folder)}
        cells = [f"{size:,}", f"{found['bytes'] / 1e9:.2f} GB", f"{found['first']:.3g} s"]
        cells += [f"{found['look_mb']:.0f} MB", f"{1e3 * found['later']:.2g} ms"]
        cells += [
            f"{found['begins']:.2g} s",
            f"{found['speed']:.0f}",
            f"{found['epoch_mb']:.0f} MB",
        ]
        print("|", " | ".join(cells), "|", flush=True)
    one, two = _trained(1, "0"), _trained(2, "0,1")
    print(f"\none process on one core: {one:.1f} lines/s; two on two: {two:.1f}; {two / one:.2f}")


def _measured(step: str, folder: str) -> dict[str, float]:
    """What a step finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "case", step, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _build(folder: Path, size: int) -> None:
    """An LMDB of rendered lines."""
    lines = []
    for number in range(DIFFERENT):
        image, label = render_line(0, number, TEXT)
        encoded = io.BytesIO()
        image.save(encoded, "png")
        lines.append((encoded.getvalue(), label.encode()))
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 40, sync=False) as environment:
        for first in range(0, size, 100_000):
            with environment.begin(write=True) as transaction:
                for number in range(first, min(size, first + 100_000)):
                    file, text = lines[number % DIFFERENT]
                    transaction.put(f"image-{number + 1:09d}".encode(), file)
                    transaction.put(f"label-{number + 1:09d}".encode(), text)
                transaction.put(b"num-samples", str(size).encode())


def _look(folder: Path) -> dict[str, float]:
    """Seconds and megabytes of the first look, and seconds of a later one."""
    data = _settings(folder)
    with _most_memory() as most:
        begun = time.perf_counter()
        _lines(data).digest()
        train = check_splits(data, 0, None, STRIDE).splits["train"]
        looked = time.perf_counter()
    _lines(data).stamp()
    seen = time.perf_counter()
    save_file({"indices": train.indices, "widths": train.widths}, folder / INDEX)
    size = float((folder / "lines" / "data.mdb").stat().st_size)
    return {"bytes": size, "first": looked - begun, "later": seen - looked, "look_mb": most[0]}


def _epoch(folder: Path) -> dict[str, float]:
    """Seconds until an epoch begins, lines a second and megabytes, with the index of the look."""
    with _most_memory() as most:
        begun = time.perf_counter()
        with safe_open(folder / INDEX, "pt") as index:
            indices, widths = (index.get_tensor(name).numpy() for name in ("indices", "widths"))
        source = open_source(_settings(folder), "train", 0)
        lines = Lines(source, indices, widths, Charset(TEXT.alphabet), MAX_WIDTH)
        batches = iter(training_batches(lines, TrainSettings(epochs=1), 0, 0))
        next(batches)
        first = time.perf_counter()
        read = sum(len(batch.labels) for batch in islice(batches, BATCHES))
        end = time.perf_counter()
    return {"begins": first - begun, "speed": read / (end - first), "epoch_mb": most[0]}


def _lines(data: DataSettings) -> Lmdb:
    source = open_source(data, "train", 0)
    assert isinstance(source, Lmdb)
    return source


def _settings(folder: Path) -> DataSettings:
    return DataSettings(root=str(folder), train="lines", val=16, text=TEXT, max_width=MAX_WIDTH)


@contextmanager
def _most_memory() -> Iterator[list[float]]:
    """Within: the most megabytes that this process has beside what it has now."""
    before, most, done = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], (_anonymous() - before) / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield most
    done.set()
    watcher.join()


def _anonymous() -> float:
    """Bytes of memory that are no pages of a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * float(status.split("RssAnon:")[1].split()[0])


def _trained(processes: int, cores: str) -> float:
    """Lines a second of the last epoch of a baseline on these cores."""
    with tempfile.TemporaryDirectory() as home:
        command = ["taskset", "--cpu-list", cores, sys.executable]
        command += ["-m", "flows.cli", "frontier", "params/quickstart.yaml"]
        for setting, value in {**TRAINED, "execution.processes": processes}.items():
            command += ["--set", f"{setting}={value}"]
        environment = {**os.environ, "CRNN_SLIM_HOME": home}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        history = next(Path(home).glob("stages/baseline-*/history.jsonl"))
        last = json.loads(history.read_text(encoding="utf-8").splitlines()[-1])
        return float(last["train/lines_per_second"])


if __name__ == "__main__":
    main()
