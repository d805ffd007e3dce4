"""Latency and throughput of the full-width VGG13, uncut and cut, in torch, onnxruntime and int8.

    .venv/bin/python -m benchmarks.latency

5,963 classes, random weights. The cut of 0.62 has the article's widths, that of 0.87 keeps 13% of
every layer; "in eights" is the same ratio in multiples of 8, which vector units like, as
`prune.round_to: 8` chooses them where the gammas of every layer fall evenly. All candidates take
turns in every round, each turn after an untimed run, so that what else the machine does hits all of
them; ratios are to the uncut network in eager torch, as it is usually written, with the same
threads, batch and width. "Channels last" is the same network in the memory format that suits CPUs.
The exports have the best path inside (`export.output: classes`), as torch has it here. The bound is
the time that the multiply-adds alone take at the speed of a large float32 matrix product.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint
from crnn.devices import describe
from crnn.export import export_onnx
from crnn.networks.recogniser import Recogniser
from crnn.quantization import layers_of, quantize
from crnn.reading import load_exported, normalised
from crnn.settings import ExportSettings, ModelSettings
from pruning.cost import interleaved_ms, macs, parameters
from pruning.gammas import absolute_gammas
from pruning.selection import keep_masks
from pruning.settings import PruneSettings
from pruning.surgery import cut

CHARACTERS = 5962
ARTICLE = (36, 50, 73, 92, 90, 119, 94, 134, 253, 177)
ROUNDS = {1: 30, 32: 8}
"""Of so many lines at a time."""

KINDS = ("torch", "channels last", "onnxruntime", "int8")
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
    print(f"{describe(torch.device('cpu'))}; medians in ms, with quartiles\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks().items():
            sizes = [path.stat().st_size / 1e6 for path in _files(Path(folder) / name, model)]
            count = f"{parameters(model)['total']:,} parameters, {macs(model) / 1e6:.1f} M MACs"
            print(f"{name}: {count}, {sizes[0]:.2f} MB, in int8 {sizes[1]:.2f} MB")
    columns = ["threads", "lines", "width", "network", *KINDS, "times as fast", "times the bound"]
    print(f"\n| {' | '.join(columns)} |\n|{' --: |' * len(columns)}")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.latency", *(str(number) for number in case)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        times: dict[str, list[float]] = json.loads(done.stdout)
        for name in networks():
            print(f"| {' | '.join(_cells(case, name, times))} |", flush=True)


def _cells(case: tuple[int, int, int], name: str, times: dict[str, list[float]]) -> list[str]:
    own = [times[f"{name} {kind}"] for kind in KINDS]
    uncut, bound = median(times["uncut torch"]), median(times[f"{name} bound"])
    gains = " / ".join(f"{uncut / median(each):.1f}" for each in own)
    bounds = " / ".join(f"{median(each) / bound:.1f}" for each in own)
    return [*(str(number) for number in case), name, *map(_cell, own), gains, bounds]


def _cell(times: list[float]) -> str:
    low, _, high = quantiles(times, n=4)
    return f"{median(times):.2f} ({low:.2f}-{high:.2f})"


def networks() -> dict[str, Recogniser]:
    """The uncut network and its cuts."""
    model = Recogniser(ModelSettings(), CHARACTERS + 1).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.bias)  # All zero, they would be one tensor of the file.
    full = [len(gamma) for gamma in absolute_gammas(model)]

    found = {"uncut": model}
    for name, widths in (("0.62", ARTICLE), ("0.87", [round(0.13 * n) for n in full])):
        masks = [torch.arange(n) < w for n, w in zip(full, widths, strict=True)]
        # Every layer's gammas pass one half where its width ends.
        gammas = [1 / (1 + torch.arange(n) / w) for n, w in zip(full, widths, strict=True)]
        eights = keep_masks(gammas, float(name), PruneSettings(round_to=8))
        found |= {f"cut {name}": cut(model, masks), f"cut {name}, in eights": cut(model, eights)}
    return found


@torch.no_grad()
def _case(threads: int, batch: int, width: int) -> dict[str, list[float]]:
    """Milliseconds of every round, by candidate."""
    torch.set_num_threads(threads)
    pixels = np.random.default_rng(0).integers(0, 255, (batch, 32, width, 3), dtype=np.uint8)
    images = torch.from_numpy(normalised(pixels))
    candidates: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks().items():
            exact, int8 = _files(Path(folder) / name, model)
            candidates[f"{name} onnxruntime"] = _reader(exact, threads, pixels)
            candidates[f"{name} int8"] = _reader(int8, threads, pixels)
            candidates[f"{name} torch"] = _eager(model, images, torch.contiguous_format)
            candidates[f"{name} channels last"] = _eager(model, images, torch.channels_last)
            candidates[f"{name} bound"] = _product(batch * macs(model, width))
        return interleaved_ms(candidates, ROUNDS[batch])


def _reader(path: Path, threads: int, pixels: np.ndarray) -> Callable[[], object]:
    exported = load_exported(path, threads)
    return lambda: exported.best_path(pixels)


def _files(place: Path, model: Recogniser) -> tuple[Path, Path]:
    """A network as ONNX, in float and in 8 bits."""
    exact, int8 = Path(f"{place}.onnx"), Path(f"{place} int8.onnx")
    charset = Charset("".join(chr(0x4E00 + i) for i in range(CHARACTERS)))
    settings = ExportSettings(output="classes")
    export_onnx(exact, Checkpoint(model, charset, 320, "random"), settings, {})
    noise = np.random.default_rng(0).integers(0, 255, (4, 32, 128, 3), dtype=np.uint8)
    quantize(exact, int8, [noise], layers_of(exact))
    return exact, int8


def _product(multiply_adds: int) -> Callable[[], object]:
    """A float32 matrix product of so many multiply-adds, of the shape that is fastest here."""
    rows = max(1, round(multiply_adds / 512**2))
    left, right = torch.randn(rows, 512), torch.randn(512, 512)
    return lambda: left @ right


def _eager(
    model: Recogniser, images: torch.Tensor, layout: torch.memory_format
) -> Callable[[], object]:
    own = deepcopy(model).to(memory_format=layout)
    given = images.contiguous(memory_format=layout)
    return lambda: own(given).softmax(2).max(2)


if __name__ == "__main__":
    main()
