"""Latency and throughput of the full-width VGG13, uncut and cut, in torch and in onnxruntime.

    .venv/bin/python -m benchmarks.latency

5,963 classes, random weights. The cut of 0.62 has the article's widths, that of 0.87 keeps 13% of
every layer. All candidates take turns in every round, so that what else the machine does hits all
of them; ratios are to the uncut network in torch with the same threads, batch and width.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint
from crnn.devices import describe
from crnn.export import export_onnx
from crnn.networks.recogniser import Recogniser
from crnn.reading import load_exported, normalised
from crnn.settings import ExportSettings, ModelSettings
from pruning.cost import macs, parameters
from pruning.gammas import absolute_gammas
from pruning.surgery import cut

CHARACTERS = 5962
ARTICLE = (36, 50, 73, 92, 90, 119, 94, 134, 253, 177)
ROUNDS = 30
CASES = [
    (threads, batch, width)
    for threads in (1, 2)
    for batch, widths in ((1, (64, 128, 256)), (32, (128,)))
    for width in widths
]


def main() -> None:
    """Measure every case in a process of its own, and print one table."""
    if len(sys.argv) > 1:
        print(json.dumps(_case(*(int(number) for number in sys.argv[1:]))))
        return
    torch.manual_seed(0)
    print(f"{describe(torch.device('cpu'))}; medians of {ROUNDS} rounds, in ms, with quartiles\n")
    for name, model in networks().items():
        print(f"{name}: {parameters(model)['total']:,} parameters, {macs(model) / 1e6:.1f} M MACs")
    print("\n| threads | lines | width | network | torch | onnxruntime | times as fast |")
    print("| --: | --: | --: | :-- | --: | --: | --: |")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.latency", *(str(number) for number in case)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        times: dict[str, list[float]] = json.loads(done.stdout)
        uncut = median(times["uncut torch"])
        for name in networks():
            eager, shipped = times[f"{name} torch"], times[f"{name} onnx"]
            gains = f"{uncut / median(eager):.1f} / {uncut / median(shipped):.1f}"
            cells = [*(str(n) for n in case), name, _cell(eager), _cell(shipped), gains]
            print(f"| {' | '.join(cells)} |", flush=True)


def _cell(times: list[float]) -> str:
    low, _, high = quantiles(times, n=4)
    return f"{median(times):.2f} ({low:.2f}-{high:.2f})"


def networks() -> dict[str, Recogniser]:
    """The uncut network and its cuts."""
    model = Recogniser(ModelSettings(), CHARACTERS + 1).eval()
    full = [len(gamma) for gamma in absolute_gammas(model)]

    def keeping(widths: list[int]) -> Recogniser:
        return cut(model, [torch.arange(n) < w for n, w in zip(full, widths, strict=True)])

    small = [round(0.13 * n) for n in full]
    return {"uncut": model, "cut 0.62": keeping(list(ARTICLE)), "cut 0.87": keeping(small)}


@torch.no_grad()
def _case(threads: int, batch: int, width: int) -> dict[str, list[float]]:
    """Milliseconds of every round, by candidate."""
    torch.set_num_threads(threads)
    pixels = np.random.default_rng(0).integers(0, 255, (batch, 32, width, 3), dtype=np.uint8)
    images = torch.from_numpy(normalised(pixels)).contiguous(memory_format=torch.channels_last)
    charset = Charset("".join(chr(0x4E00 + i) for i in range(CHARACTERS)))
    candidates: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks().items():
            path = Path(folder) / f"{name}.onnx"
            export_onnx(path, Checkpoint(model, charset, 320, "random"), ExportSettings(), {})
            candidates[f"{name} onnx"] = _reader(path, threads, pixels)
            candidates[f"{name} torch"] = _eager(model, images)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(ROUNDS + 3):
            for name, run in candidates.items():
                begun = time.perf_counter()
                run()
                if number >= 3:
                    times[name].append(1000 * (time.perf_counter() - begun))
    return times


def _reader(path: Path, threads: int, pixels: np.ndarray) -> Callable[[], object]:
    exported = load_exported(path, threads)
    return lambda: exported.best_path(pixels)


def _eager(model: Recogniser, images: torch.Tensor) -> Callable[[], object]:
    model.to(memory_format=torch.channels_last)
    return lambda: model(images).softmax(2).max(2)


if __name__ == "__main__":
    main()
