"""The export stage: files for other runtimes, and proof that they read as the network does."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from crnn.checkpoint import load_checkpoint
from crnn.data.batches import Batch, Lines, evaluation_batches, normalise
from crnn.errors import CheckpointError
from crnn.evaluation import Reading, frame_lengths, read, score
from crnn.export import export_onnx
from crnn.networks.recogniser import Recogniser
from crnn.reading import Reader, load_exported
from crnn.settings import ExportSettings
from flows.stages.work import Outcome, Work

ONNX = "model.onnx"

TOLERANCE = 1e-4
"""Largest difference of a probability between a network and its export."""


def export(work: Work) -> Outcome:
    """Write a network as ONNX, and read the val lines with both."""
    settings = ExportSettings.model_validate(work.settings["export"])
    checkpoint = load_checkpoint(work.input("model"))
    export_onnx(work.out / ONNX, checkpoint, settings, _provenance(work))
    lines, exported = work.lines("val"), load_exported(work.out / ONNX)
    truth = {
        r.index: r.text for r in read(checkpoint.model, evaluation_batches(lines), lines.charset)
    }
    found = list(read_exported(exported, lines))
    differing = sum(truth[reading.index] != reading.text for reading in found)
    difference = largest_difference(checkpoint.model, exported, lines)
    if difference > TOLERANCE or differing:
        raise CheckpointError(
            "the export does not read as the network it was made of: probabilities differ by up to"
            f" {difference:.2g} ({TOLERANCE:g} is allowed), and {differing} of {len(found)} texts"
        )
    return ONNX, {
        **score(found, work.unseen()),
        "export/max_difference": difference,
        "export/bytes": float((work.out / ONNX).stat().st_size),
    }


def read_exported(exported: Reader, lines: Lines) -> Iterator[Reading]:
    """Read every line with an exported network."""
    for batch in evaluation_batches(lines):
        best, classes = exported.best_path(_pixels(batch))
        lengths = frame_lengths(batch.widths, exported.stride).tolist()
        for n, (length, label) in enumerate(zip(lengths, batch.labels, strict=True)):
            text = exported.charset.decode(classes[n, :length].tolist())
            confidence = float(best[n, :length].prod(dtype=np.float64))
            yield Reading(batch.indices[n], text, label, confidence)


@torch.inference_mode()
def largest_difference(model: Recogniser, exported: Reader, lines: Lines) -> float:
    """Between the probabilities of the best path in torch and in the export, over all frames."""
    worst = 0.0
    for batch in evaluation_batches(lines):
        best, _ = exported.best_path(_pixels(batch))
        expected = model(normalise(batch.images)).softmax(2).amax(2).T.numpy()
        worst = max(worst, float(np.abs(best - expected).max()))
    return worst


def _pixels(batch: Batch) -> np.ndarray:
    """(N, 32, W, 3), uint8."""
    return batch.images.permute(0, 2, 3, 1).contiguous().numpy()


def _provenance(work: Work) -> dict[str, Any]:
    """What the network was made of; its stage's key leads to the MLflow run."""
    inputs = {name: given["sha256"] for name, given in work.job["inputs"].items()}
    return {"made_of": inputs, **work.settings["of"]}
