"""Training speed of the full-width VGG13 against a plain float32 loop and the machine's peak.

    python benchmarks/throughput.py

Both loops take the same network, batch (32 lines of 32 x 128 px) and optimizer, in turn, and
medians are compared, so that the ratio holds although the machine's speed drifts.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from crnn.data.batches import Batch, normalise
from crnn.devices import best_device, describe
from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings, TrainSettings
from crnn.training import Penalty, start, train_step
from pruning.cost import macs

LINES, WIDTH, CLASSES, LABEL, ROUNDS = 32, 128, 5963, 8, 12
BACKWARD = 2
"""The backward pass takes about twice the multiply-adds of the forward pass."""


def main() -> None:
    """Measure and print."""
    device = best_device()
    batch, settings = random_batch(), TrainSettings(epochs=1)
    ours = start(network(device), settings, seed=0)
    ours.model.to(memory_format=torch.channels_last)
    plain = start(network(device), settings, seed=0)
    peak = matmul_peak(device)
    seconds = interleaved(
        {
            "crnn-slim": lambda: train_step(ours, batch, 0.5, settings, Penalty()),
            "plain NCHW float32": lambda: plain_step(plain.model, plain.optimizer, batch),
        }
    )
    work = 2 * LINES * (1 + BACKWARD) * macs(network(torch.device("cpu")), WIDTH)
    print(
        f"VGG13 at full width, {CLASSES} classes, batch {LINES} x 32 x {WIDTH}, {describe(device)}"
    )
    print(f"float32 matrix-multiply peak: {peak / 1e9:.0f} GFLOP/s")
    for name, median in seconds.items():
        rate = work / median
        print(
            f"{name}: {LINES / median:.1f} lines/s, {rate / 1e9:.0f} GFLOP/s,"
            f" {100 * rate / peak:.0f}% of that peak"
        )
    ratio = seconds["plain NCHW float32"] / seconds["crnn-slim"]
    print(f"ratio: {ratio:.2f}")


def network(device: torch.device) -> Recogniser:
    """The article's network with random weights."""
    torch.manual_seed(0)
    return Recogniser(ModelSettings(), CLASSES).to(device).train()


def random_batch() -> Batch:
    """Noise with random labels: the time does not depend on what is in a picture."""
    random = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (LINES, 3, 32, WIDTH), dtype=torch.uint8, generator=random),
        widths=torch.full((LINES,), WIDTH),
        targets=torch.randint(1, CLASSES, (LINES * LABEL,), generator=random),
        target_lengths=torch.full((LINES,), LABEL),
        labels=[""] * LINES,
        names=[""] * LINES,
        indices=list(range(LINES)),
        size=LINES,
    )


def plain_step(model: Recogniser, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """What a loop without any care for the machine does."""
    device = model.device
    logits = model(normalise(batch.images.to(device)))
    frames = torch.full((LINES,), len(logits))
    targets = batch.targets.to(device)
    loss = F.ctc_loss(logits.log_softmax(2), targets, frames, batch.target_lengths)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    loss.item()


def interleaved(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each step, in turn, the first two rounds not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 2):
        for name, step in steps.items():
            synchronise()
            begun = time.perf_counter()
            step()
            synchronise()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def synchronise() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_peak(device: torch.device, size: int = 2048) -> float:
    """Best float32 rate of a square matrix product, operations a second."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
