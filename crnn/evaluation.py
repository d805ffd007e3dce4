"""Reading lines with a network, and scoring what it read."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from crnn.charset import Charset
from crnn.data.batches import Batch, Lines, evaluation_batches, normalise
from crnn.distributed import in_turn, processes, rank
from crnn.metrics import ned, wilson_interval, word_accuracy
from crnn.networks.recogniser import Recogniser


@dataclass(frozen=True)
class Reading:
    """What a network made of a line.

    Attributes:
        index: Number of the sample in its source.
        text: What was read.
        label: What is written.
        confidence: Product over the frames of the largest probability, in [0, 1].
    """

    index: int
    text: str
    label: str
    confidence: float


def frame_lengths(widths: Tensor, stride: int) -> Tensor:
    """Frames that belong to lines of these widths (N,), in pixels: at least one."""
    return (widths // stride).clamp(min=1)


@torch.inference_mode()
def read(model: Recogniser, batches: Iterable[Batch], charset: Charset) -> list[Reading]:
    """Read every line of the batches by greedy (best path) decoding, in float32."""
    model.eval()
    device = model.device
    readings = []
    for batch in batches:
        images = normalise(batch.images.to(device)).contiguous(memory_format=torch.channels_last)
        best, classes = (found.cpu() for found in model(images).log_softmax(2).max(2))  # (T, N)
        lengths = frame_lengths(batch.widths, model.stride).tolist()
        for n, (length, label) in enumerate(zip(lengths, batch.labels, strict=True)):
            text = charset.decode(classes[:length, n].tolist())
            confidence = float(best[:length, n].sum().exp())
            readings.append(Reading(batch.indices[n], text, label, confidence))
    return readings


def score(readings: list[Reading], unseen: set[int]) -> dict[str, float]:
    """Accuracy of readings, as logged under `val/`.

    Args:
        readings: One for each line.
        unseen: Samples whose label does not occur in train.
    """
    texts, labels = [r.text for r in readings], [r.label for r in readings]
    new = [r for r in readings if r.index in unseen]
    accuracy = word_accuracy(texts, labels)
    low, high = wilson_interval(accuracy, len(readings))
    scores = {
        "val/word_accuracy": accuracy,
        "val/word_accuracy_low": low,
        "val/word_accuracy_high": high,
        "val/ned": ned(texts, labels),
        "val/samples": float(len(readings)),
        "val/samples_unseen": float(len(new)),
    }
    if new:
        scores["val/word_accuracy_unseen"] = word_accuracy(
            [r.text for r in new], [r.label for r in new]
        )
    return scores


def evaluate(model: Recogniser, lines: Lines, unseen: set[int]) -> dict[str, float]:
    """Score a network on every line, a part in each process; unseen as for score."""
    part = slice(rank(), None, processes())
    batches = evaluation_batches(lines, part=part)
    readings = in_turn([read(model, [batch], lines.charset) for batch in batches])
    return score(list(chain.from_iterable(readings)), unseen)
