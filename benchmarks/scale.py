"""What millions of lines cost: time, throughput and memory, and what a second process gives.

    .venv/bin/python -m benchmarks.scale [10000 100000 2000000]

Builds an LMDB of so many small lines (a thousand are rendered, and written again and again) in a
temporary folder. In a process of its own for each number it measures the first look at the data
(fingerprint, and every line decoded and checked), what a later run needs to see that nothing has
changed, and the beginning of a shuffled, augmented epoch. Memory is the most that the process had
beside what it has after its imports, without the pages of the file, which the system keeps as long
as it likes. At the end a VGG13 of full width trains on one core, and on two processes with a core
each.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import lmdb

from crnn.data.batches import Lines, training_batches
from crnn.data.check import check_splits
from crnn.data.render import render_line
from crnn.data.sources import open_source
from crnn.networks.vgg import STRIDE
from crnn.settings import DataSettings, TextSettings, TrainSettings

SIZES = (10_000, 100_000, 2_000_000)
DIFFERENT = 1_000
BATCHES = 200
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
        print(json.dumps(_case(Path(sys.argv[2]))))
        return
    print("| lines | LMDB | first look | later | epoch begins after | lines/s | memory |")
    print("| --: | --: | --: | --: | --: | --: | --: |")
    for size in [int(size) for size in sys.argv[1:]] or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            _build(Path(folder) / "lines", size)
            command = [sys.executable, "-m", "benchmarks.scale", "case", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        seconds = [f"{found[name]:.3g} s" for name in ("first", "later", "begins")]
        cells = [f"{size:,}", f"{found['bytes'] / 1e9:.2f} GB", *seconds]
        print("|", " | ".join([*cells, f"{found['speed']:.0f}", f"{found['mb']:.0f} MB"]), "|")
    one, two = _trained(1, ["taskset", "--cpu-list", "0"]), _trained(2, [])
    print(f"\none process on one core: {one:.1f} lines/s; two on two: {two:.1f}; {two / one:.2f}")


def _build(folder: Path, size: int) -> None:
    """An LMDB of rendered lines."""
    lines = []
    for number in range(DIFFERENT):
        image, label = render_line(0, number, TEXT)
        file = io.BytesIO()
        image.save(file, "png")
        lines.append((file.getvalue(), label.encode()))
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 40, sync=False) as environment:
        for first in range(0, size, 100_000):
            with environment.begin(write=True) as transaction:
                for number in range(first, min(size, first + 100_000)):
                    image, label = lines[number % DIFFERENT]
                    transaction.put(f"image-{number + 1:09d}".encode(), image)
                    transaction.put(f"label-{number + 1:09d}".encode(), label)
                transaction.put(b"num-samples", str(size).encode())


def _case(folder: Path) -> dict[str, float]:
    """Seconds, lines a second and megabytes, for the LMDB in a folder."""
    data = DataSettings(root=str(folder), train="lines", val=16, text=TEXT, max_width=160)
    source = open_source(data, "train", 0)
    before, most, done = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], _anonymous())

    threading.Thread(target=watch, daemon=True).start()
    begun = time.perf_counter()
    source.digest()
    checked = check_splits(data, 0, None, STRIDE)
    looked = time.perf_counter()
    open_source(data, "train", 0).stamp()
    seen = time.perf_counter()
    train = checked.splits["train"]
    lines = Lines(source, train.indices, train.widths, checked.charset, data.max_width)
    batches = iter(training_batches(lines, TrainSettings(epochs=1), 0, 0))
    next(batches)
    first = time.perf_counter()
    read = sum(len(batch.labels) for batch in islice(batches, BATCHES))
    end = time.perf_counter()
    done.set()
    return {
        "bytes": float((folder / "lines" / "data.mdb").stat().st_size),
        "first": looked - begun,
        "later": seen - looked,
        "begins": first - seen,
        "speed": read / (end - first),
        "mb": (most[0] - before) / 1e6,
    }


def _anonymous() -> float:
    """Bytes of memory that are no pages of a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * float(status.split("RssAnon:")[1].split()[0])


def _trained(processes: int, prefix: list[str]) -> float:
    """Lines a second of the last epoch of a baseline."""
    with tempfile.TemporaryDirectory() as home:
        command = [*prefix, sys.executable, "-m", "flows.cli", "frontier", "params/quickstart.yaml"]
        for setting, value in {**TRAINED, "execution.processes": processes}.items():
            command += ["--set", f"{setting}={value}"]
        environment = {**os.environ, "CRNN_SLIM_HOME": home}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        history = next(Path(home).glob("stages/baseline-*/history.jsonl"))
        last = json.loads(history.read_text(encoding="utf-8").splitlines()[-1])
        return float(last["train/lines_per_second"])


if __name__ == "__main__":
    main()
