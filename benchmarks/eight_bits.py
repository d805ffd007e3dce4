"""What 8 bits cost: each exported network of a frontier, in float and in 8 bits, line by line.

    .venv/bin/python -m benchmarks.eight_bits params/sroie.yaml

Computes the frontier or finds it in the cache, and reads the val lines, and copies of them with the
augmentation of training. Of a thousand lines a handful change by rounding alone, some for the
better and some for the worse; the copies, which no training has seen, tell a loss from chance.
"""

import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import numpy as np

from benchmarks.cuts import lines_of
from benchmarks.slimming import frontier
from crnn.data.batches import Batch, evaluation_batches, training_batches
from crnn.reading import load_exported
from flows import project
from flows.experiment import load_experiment
from flows.stages.export import read_exported

COPIES = 5


def main() -> None:
    """Read, and print a table."""
    params, *given = sys.argv[1:]
    experiment = load_experiment(Path(params), given)
    assert experiment.quantize is not None
    found = {row["point"]: row for row in frontier(params, given, [], [experiment.seed])}
    val = lines_of(experiment)[1]
    plain = list(evaluation_batches(val))
    copies = [
        batch
        for copy in range(COPIES)
        for batch in training_batches(val, experiment.quantize, experiment.seed, copy)
    ]
    print(f"{len(val)} val lines, {COPIES * len(val)} augmented copies: lines that are read worse")
    print("and better in 8 bits, and the change of word accuracy in points with its standard error")
    print("\n| point | worse | better | change | copies: worse | better | change |")
    print(f"| :-- |{' --: |' * 6}")
    for point in found:
        if f"{point} int8" in found:
            pair = [project.home() / found[p]["onnx"] for p in (point, f"{point} int8")]
            cells = [*_compared(pair, plain), *_compared(pair, copies)]
            print(f"| {' | '.join([point, *cells])} |", flush=True)


def _compared(pair: Sequence[Path], batches: Sequence[Batch]) -> list[str]:
    """Lines that only the first of two files reads rightly, and only the second; the change."""
    exact, int8 = (_right(path, batches) for path in pair)
    worse, better = int((exact & ~int8).sum()), int((int8 & ~exact).sum())
    change, error = (100 * n / len(exact) for n in (better - worse, sqrt(better + worse)))
    return [str(worse), str(better), f"{change:+.2f} ± {error:.2f}"]


def _right(path: Path, batches: Sequence[Batch]) -> np.ndarray:
    """Which lines an exported network reads without an error, (N,) boolean."""
    readings = read_exported(load_exported(path), batches)
    return np.array([reading.text == reading.label for reading in readings])


if __name__ == "__main__":
    main()
