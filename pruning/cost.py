"""What a network costs: parameters, multiply-adds, bytes, milliseconds."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from crnn.checkpoint import Checkpoint, checkpoint_bytes
from crnn.data.images import HEIGHT
from crnn.errors import SettingsError
from crnn.networks.deploy import deployed
from crnn.networks.recogniser import Recogniser

LINE_WIDTH = 128
"""Width in pixels of the line that MACs and latency are stated for."""

WARM_UP = 2
"""Rounds that are not counted."""

K = TypeVar("K", bound=Hashable)


def parameters(model: Recogniser) -> dict[str, int]:
    """Trainable parameters by part and in all."""
    parts = {"cnn": model.cnn, "lstm": model.rnn, "head": model.head, "total": model}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def macs(model: Recogniser, width: int = LINE_WIDTH) -> int:
    """Multiply-adds of one line of 32 x width px; a multiply-add counts one.

    Convolutions, LSTM gates and the head; BatchNorm, pools and activations are not counted.
    """
    total = 0

    def convolution(layer: nn.Conv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [
        m.register_forward_hook(convolution) for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    try:
        with torch.inference_mode():
            frames = len(model.eval()(torch.zeros(1, 3, HEIGHT, width, dtype=model.dtype)))
    finally:
        for hook in hooks:
            hook.remove()
    parts = (model.rnn, model.head)
    weights = [p for part in parts for name, p in part.named_parameters() if "weight" in name]
    return total + frames * sum(weight.numel() for weight in weights)


@torch.inference_mode()
def latency_ms(model: Recogniser, width: int = LINE_WIDTH, rounds: int = 30) -> float:
    """Median milliseconds to read one line of 32 x width px on one CPU thread, warmed up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = model.cpu().eval().to(memory_format=torch.channels_last)
        line = torch.zeros(1, 3, HEIGHT, width).contiguous(memory_format=torch.channels_last)
        return median(interleaved_ms({0: lambda: model(line)}, rounds)[0])
    finally:
        torch.set_num_threads(threads)


def interleaved_ms(runs: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, list[float]]:
    """Milliseconds that functions take, each in turn in every round.

    A turn is two runs, of which the second counts: the first brings back what the others have
    thrown out of the caches.
    """
    times: dict[K, list[float]] = {name: [] for name in runs}
    for number in range(rounds + WARM_UP):
        for name, run in runs.items():
            run()
            begun = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begun))
    return times


def as_it_ships(model: Recogniser) -> Recogniser:
    """The deployed form of a network, which may be the network itself."""
    return deployed(model) or model


COSTS: dict[str, Callable[[Checkpoint], float]] = {
    "size_mb": lambda network: len(checkpoint_bytes(network)) / 1e6,
    "params": lambda network: parameters(as_it_ships(network.model))["total"],
    "macs": lambda network: macs(as_it_ships(network.model)),
    "latency_ms": lambda network: latency_ms(as_it_ships(network.model)),
}
"""What each key of prune.targets measures."""


def out_of_reach(kind: str, value: float, nearest: float, ratio: float) -> SettingsError:
    """The refusal of a target.

    Args:
        kind: Key of COSTS.
        value: What was asked for.
        nearest: The least that a cut costs.
        ratio: Of that cut.
    """
    reachable = math.ceil(1000 * nearest) / 1000
    return SettingsError(
        f"prune.targets.{kind} {value:,.10g} is out of reach; the nearest is {reachable:,.10g},"
        f" at ratio {ratio:g}, the largest that the floors allow"
    )
