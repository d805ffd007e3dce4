"""What keys, hashing, locks, tracking, Prefect and a process for each stage cost.

    .venv/bin/python -m benchmarks.overhead

Runs a sweep of 20 ratios over the full-width network (5,963 classes, 41 MB) that hardly trains,
one stage after another, and the same command again. What a run took beyond its computations is
overhead; the second run is all overhead.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

RATIOS = [round(0.5 + 0.02 * step, 2) for step in range(20)]
EXPERIMENT = {
    "name": "overhead",
    "ratios": RATIOS,
    "data": {
        "train": 32,
        "val": 32,
        "charset": "charset.txt",
        "max_width": 64,
        "text": {"alphabet": "0123456789", "min_length": 1, "max_length": 3},
    },
    "model": {"width": 1.0},
    "baseline": {"epochs": 1},
    "sparse": {"epochs": 2, "target_ratio": 0.9},
    "finetune": {"epochs": 1},
    "execution": {"parallel": 1},
}
TEN_MINUTES = 600


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        charset = "0123456789" + "".join(map(chr, range(0x4E00, 0x4E00 + 5952)))
        (folder / "charset.txt").write_text(charset, encoding="utf-8")
        data = {**EXPERIMENT["data"], "root": name}  # type: ignore[dict-item]
        (folder / "overhead.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "data": data}))
        first, result = timed_run(folder)
        again, cached = timed_run(folder)
        manifests = [json.loads(p.read_text()) for p in folder.glob("state/stages/*/manifest.json")]
    assert not cached["computed"], cached["computed"]
    assert len(result["computed"]) == len(manifests)
    computing = sum(manifest["seconds"] for manifest in manifests)
    each = (first - computing) / len(manifests)
    print(f"{len(manifests)} stages took {first:.0f} s, {computing:.0f} s of it in computations")
    print(f"overhead of a stage: {each:.1f} s, {100 * each / TEN_MINUTES:.2f}% of ten minutes")
    print(f"the same command again, {len(RATIOS)} ratios cached: {again:.1f} s")


def timed_run(folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds and printed result of one frontier command."""
    command = [sys.executable, "-m", "flows.cli", "frontier", str(folder / "overhead.yaml")]
    environment = {**os.environ, "CRNN_SLIM_HOME": str(folder / "state")}
    begun = time.perf_counter()
    run = subprocess.run(
        [*command, "--json"], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return time.perf_counter() - begun, json.loads(run.stdout)


if __name__ == "__main__":
    main()
