"""What an MLflow server that goes away in mid-training costs the training.

    .venv/bin/python -m benchmarks.outage

One training, beside which a real server is killed and started again, frozen (it accepts
connections and never answers) and woken, turn and turn about. While it is away two things are
compared with the time just before and after: the seconds from epoch to epoch, and the processor
time of the pipeline, which does the recording and all that training could suffer from. The second
says it more exactly on a machine that others share.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import yaml

from flows.servers import free_port
from tests.flows.conftest import serve_mlflow

Phase = tuple[float, float]
"""Seconds an epoch, share of one core."""

ROUNDS = 4
PHASE, SETTLE = 30.0, 35.0
"""Seconds that are compared; seconds until what was missed has been recorded (retry: 30 s)."""

EXPERIMENT = {
    "name": "outage",
    "ratios": [0.5],
    "data": {
        "train": 400,
        "val": 32,
        "max_width": 128,
        "text": {"alphabet": "0123456789", "min_length": 1, "max_length": 6},
    },
    "model": {"width": 0.25},
    "baseline": {"epochs": 100_000},
    "sparse": {"epochs": 1, "target_ratio": 0.5},
    "finetune": {"epochs": 1},
}


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, ExitStack() as servers:
        folder, port = Path(name), free_port()
        server = servers.enter_context(serve_mlflow(folder, port))
        training = _train(folder, port)
        try:
            history = _history(folder, training)
            time.sleep(SETTLE)
            present, away = [_phase(history, training.pid)], []
            for number in range(2 * ROUNDS):
                sent = (signal.SIGKILL, signal.SIGSTOP)[number % 2]
                os.killpg(server.pid, sent)
                away.append(_phase(history, training.pid))
                if sent == signal.SIGKILL:
                    servers.close()
                    server = servers.enter_context(serve_mlflow(folder, port))
                else:
                    os.killpg(server.pid, signal.SIGCONT)
                time.sleep(SETTLE)
                present.append(_phase(history, training.pid))
                print(sent.name, away[-1], present[-2:], file=sys.stderr, flush=True)
        finally:
            training.terminate()
            training.wait()
    for fate, first in (("killed", 0), ("frozen", 1)):
        around = zip(present[first::2], present[first + 1 :: 2], strict=False)
        _print(fate, list(zip(away[first::2], around, strict=True)))


def _train(folder: Path, port: int) -> subprocess.Popen[bytes]:
    (folder / "outage.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    environment = {
        **os.environ,
        "CRNN_SLIM_HOME": str(folder / "state"),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "flows.cli", "frontier", str(folder / "outage.yaml")]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)


def _history(folder: Path, training: subprocess.Popen[bytes]) -> Path:
    """The file that is written anew after each epoch, as soon as it is there."""
    while not (found := list((folder / "state").glob("*/baseline-*/out/history.jsonl"))):
        assert training.poll() is None, "the training ended before its first epoch"
        time.sleep(0.1)
    return found[0]


def _phase(history: Path, pid: int) -> Phase:
    """Mean seconds from one epoch to the next, and the pipeline's share of one core."""
    begun, ends, used = time.monotonic(), [history.stat().st_mtime], _processor_seconds(pid)
    while time.monotonic() < begun + PHASE:
        time.sleep(0.05)
        if (now := history.stat().st_mtime) != ends[-1]:
            ends.append(now)
    share = (_processor_seconds(pid) - used) / (time.monotonic() - begun)
    return (ends[-1] - ends[1]) / (len(ends) - 2), share


def _processor_seconds(pid: int) -> float:
    """User and system time of a process so far, its children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _print(fate: str, outages: list[tuple[Phase, tuple[Phase, Phase]]]) -> None:
    ratios = [2 * away[0] / (before[0] + after[0]) for away, (before, after) in outages]
    extra = [away[1] - (before[1] + after[1]) / 2 for away, (before, after) in outages]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(
        f"server {fate}, {len(outages)} outages of {PHASE:.0f} s: an epoch takes"
        f" {100 * (statistics.mean(ratios) - 1):+.1f}% (standard error {100 * error:.1f}%),"
        f" the pipeline {100 * statistics.mean(extra):+.2f}% of a core"
        f" (at most {100 * max(extra):+.2f}%)"
    )


if __name__ == "__main__":
    main()
