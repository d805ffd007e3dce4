"""What an MLflow server that goes away in mid-training costs the training.

    python -m benchmarks.outage

Trains the same stages again and again, each time with an MLflow server of its own: one that stays,
one that is killed, and one that is stopped and so accepts connections but never answers. Compares
the seconds of the epochs after that moment, and of the whole command. The order within a round
rotates, the median of the rounds counts.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.flows.conftest import free_port, serve_mlflow

ROUNDS = 5
SIGNALS = {"stays": signal.SIGCONT, "killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
EXPERIMENT = {
    "name": "outage",
    "ratios": [0.5],
    "data": {
        "train": 2000,
        "val": 32,
        "max_width": 128,
        "text": {"alphabet": "0123456789", "min_length": 1, "max_length": 6},
    },
    "model": {"width": 0.25},
    "baseline": {"epochs": 8},
    "sparse": {"epochs": 1, "target_ratio": 0.5},
    "finetune": {"epochs": 1},
}


def main() -> None:
    """Measure and print."""
    found: dict[str, list[tuple[float, float]]] = {fate: [] for fate in SIGNALS}
    fates = list(SIGNALS)
    for number in range(ROUNDS):
        for fate in fates[number % len(fates) :] + fates[: number % len(fates)]:
            found[fate].append(timed_run(fate))
            print(f"round {number + 1}, {fate}: {found[fate][-1]}", file=sys.stderr, flush=True)
    for name, part in (("epochs", 0), ("whole command", 1)):
        for fate in ("killed", "frozen"):
            ratios = [a[part] / b[part] for a, b in zip(found[fate], found["stays"], strict=True)]
            print(
                f"server {fate}, {name}: {100 * (statistics.median(ratios) - 1):+.1f}%"
                f" ({100 * (min(ratios) - 1):+.1f} to {100 * (max(ratios) - 1):+.1f}"
                f" over {ROUNDS} rounds)"
            )


def timed_run(fate: str) -> tuple[float, float]:
    """Seconds of the baseline's epochs after the first two, and of the whole command."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        serve_mlflow(Path(name), port) as server,
    ):
        folder = Path(name)
        (folder / "outage.yaml").write_text(yaml.safe_dump(EXPERIMENT))
        command = [sys.executable, "-m", "flows.cli", "frontier", str(folder / "outage.yaml")]
        environment = {
            **os.environ,
            "CRNN_SLIM_HOME": str(folder / "state"),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        }
        begun = time.perf_counter()
        run = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not list(folder.glob("state/*/baseline-*/out/history.jsonl")):
            assert run.poll() is None
            time.sleep(0.05)
        os.killpg(server.pid, SIGNALS[fate])
        assert run.wait() == 0
        seconds = time.perf_counter() - begun
        (history,) = folder.glob("state/stages/baseline-*/history.jsonl")
        epochs = [json.loads(line)["train/seconds"] for line in history.read_text().splitlines()]
        return sum(epochs[2:]), seconds


if __name__ == "__main__":
    main()
