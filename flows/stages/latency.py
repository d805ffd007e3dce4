"""The stage that times all networks of a seed side by side, in every runtime they ship for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import numpy as np
import torch

from crnn.checkpoint import load_checkpoint
from crnn.data.images import HEIGHT
from crnn.networks.deploy import deployed
from crnn.networks.recogniser import Recogniser
from crnn.reading import load_exported
from flows.rows import BASELINE, EXPORTED, INT8, ONNX_LATENCY, OVER_TORCH
from flows.stages.work import Outcome, Work
from pruning.cost import interleaved_ms

SHAPES = ((1, 64), (1, 128), (1, 256), (32, 128))
"""Lines at a time, and their width in pixels."""

ROUNDS = {1: 15, 32: 4}
"""Of so many lines at a time."""

RESULT = "latency.json"


class Case(NamedTuple):
    """What is asked of every network.

    Attributes:
        threads: Of the CPU.
        lines: At a time: 1 for latency, more for throughput.
        width: Of the lines, px.
    """

    threads: int
    lines: int
    width: int

    def __str__(self) -> str:
        return f"{self.lines}x{self.width}_{self.threads}t"


STATED_CASE = Case(threads=1, lines=1, width=128)
STATED = {
    "torch": "cost/latency_ms",
    "deployed": "cost/latency_deployed_ms",
    "onnx": ONNX_LATENCY,
}
"""What tables and plots show: the median of one case, by runtime."""


@dataclass(frozen=True)
class Candidate:
    """A network in a runtime.

    Attributes:
        point: Its name.
        runtime: "torch", "deployed" (torch, with the branches of training folded away) or "onnx".
        ready: Gives the function to time in a case, its threads set.
    """

    point: str
    runtime: str
    ready: Callable[[Case], Callable[[], object]]


def latency(work: Work) -> Outcome:
    """Time every network in each case, in turn, so that what else the machine does hits all.

    Returns:
        The figures by point: medians and quartiles in ms, and how many times as fast each is as the
        baseline in the same runtime, and as the baseline in torch.
    """
    candidates = _candidates(work)
    cases = [Case(threads, *shape) for threads, shape in product(work.settings["threads"], SHAPES)]
    figures: dict[str, dict[str, float]] = {candidate.point: {} for candidate in candidates}
    for number, case in enumerate(cases):
        torch.set_num_threads(case.threads)
        runs = {(c.point, c.runtime): c.ready(case) for c in candidates}
        times = interleaved_ms(runs, ROUNDS[case.lines])
        spread = {name: quantiles(of_one, n=4) for name, of_one in times.items()}
        for name in spread:
            figures[name[0]] |= _figures(case, name, spread)
        done = {"step": number + 1, "steps": len(cases)}
        work.emit({"event": "step", "phase": f"timing {case}", **done})
    work.write_json(RESULT, figures)
    return RESULT, {"latency/networks": float(len(candidates)), "latency/cases": float(len(cases))}


def _figures(
    case: Case, name: tuple[str, str], spread: dict[tuple[str, str], list[float]]
) -> dict[str, float]:
    """What a row says of a network in one runtime."""
    point, runtime = name
    low, middle, high = spread[name]
    timed = f"{runtime}_{case}"
    figures = {
        f"latency/{timed}_ms": middle,
        f"latency/{timed}_low_ms": low,
        f"latency/{timed}_high_ms": high,
    }
    own = BASELINE + INT8 * point.endswith(INT8)
    references = {
        f"speedup/{timed}": (own, runtime),
        f"speedup/{timed}{OVER_TORCH}": (BASELINE, "torch"),
    }
    for figure, reference in references.items():
        if reference in spread:
            figures[figure] = spread[reference][1] / middle
    if case == STATED_CASE:
        figures[STATED[runtime]] = middle
    return figures


def _candidates(work: Work) -> list[Candidate]:
    found = []
    for name in work.job["inputs"]:
        kind, point = name.split(" ", 1)
        if kind == EXPORTED:
            found.append(Candidate(point, "onnx", _in_onnxruntime(work.input(name))))
            continue
        model = load_checkpoint(work.input(name)).model
        found.append(Candidate(point, "torch", _in_torch(model)))
        if shipped := deployed(model):
            found.append(Candidate(point, "deployed", _in_torch(shipped)))
    return found


def _in_torch(model: Recogniser) -> Callable[[Case], Callable[[], object]]:
    model.cpu().eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(images: torch.Tensor) -> object:
        return model(images).softmax(2).max(2)

    def ready(case: Case) -> Callable[[], object]:
        images = torch.zeros(case.lines, 3, HEIGHT, case.width)
        return partial(run, images.contiguous(memory_format=torch.channels_last))

    return ready


def _in_onnxruntime(path: Path) -> Callable[[Case], Callable[[], object]]:
    def ready(case: Case) -> Callable[[], object]:
        pixels = np.zeros((case.lines, HEIGHT, case.width, 3), np.uint8)
        return partial(load_exported(path, case.threads).best_path, pixels)

    return ready
