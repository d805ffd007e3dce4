"""The export stage: files for other runtimes, and proof that they read as the network does."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from crnn.checkpoint import Checkpoint, load_checkpoint, reader_of
from crnn.data.batches import Batch, Lines, evaluation_batches, normalise
from crnn.data.images import PADDING, fitted_width
from crnn.errors import CheckpointError
from crnn.evaluation import Reading, score
from crnn.export import NARROWEST, Shipped, export_onnx, export_program
from crnn.reading import Decoded, Reader, decode, load_exported
from crnn.settings import ExportSettings
from flows.cache import ERRORS, ONNX, PT2
from flows.stages.work import Outcome, Work

TOLERANCE = 1e-4
"""Largest difference of a probability between a network and its export."""

PROGRAM_LINES = 64
"""Val lines that torch.export's file is tried on."""


def export(work: Work) -> Outcome:
    """Write a network as ONNX, and read the val lines with both."""
    settings = ExportSettings.model_validate(work.settings["export"])
    checkpoint = load_checkpoint(work.input("model"))
    export_onnx(work.out / ONNX, checkpoint, settings, _provenance(work))
    found, difference, differing = _read_with_both(
        opened(work.out / ONNX), reader_of(checkpoint), work.lines("val")
    )
    if not difference <= TOLERANCE or differing:
        raise CheckpointError(
            "the export does not read as the network it was made of: probabilities differ by up to"
            f" {difference:.2g} ({TOLERANCE:g} is allowed), and {differing} of {len(found)} texts"
        )
    if settings.pt2:
        _write_program(work, checkpoint, settings)
    write_errors(work, found)
    return ONNX, {
        **score(found, work.unseen()),
        "export/max_difference": difference,
        "export/bytes": float((work.out / ONNX).stat().st_size),
    }


def _write_program(work: Work, checkpoint: Checkpoint, settings: ExportSettings) -> None:
    """Write torch.export's file too, and hold all that it gives against the network."""
    export_program(work.out / PT2, checkpoint, settings, _provenance(work))
    program = torch.export.load(work.out / PT2).module(check_guards=False)
    shipped = Shipped(checkpoint.model, settings).eval()
    for batch in evaluation_batches(work.lines("val").sample(PROGRAM_LINES)):
        narrow = max(0, NARROWEST - batch.images.shape[3])
        images = F.pad(batch.images, (0, narrow), value=PADDING)
        given = images.permute(0, 2, 3, 1) if settings.normalise else normalise(images)
        with torch.no_grad():
            found, expected = program(given), shipped(given)
        try:
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        except AssertionError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                "torch.export's file does not compute what the network does it was made of"
                f" ({reason}); leave it out with export.pt2=false"
            ) from error


def judge(work: Work) -> Outcome:
    """Read the val lines with an export that may have been made of other data.

    A character that is not among its own is one that it reads wrongly. Lines are squeezed to its
    own widest, as they are where it serves.
    """
    exported = opened(work.input("export"))
    lines = _squeezed(work.lines("val"), exported.max_width)
    scores = score(read_exported(exported, evaluation_batches(lines)), work.unseen())
    work.write_json("scores.json", scores)
    return "scores.json", scores


def _squeezed(lines: Lines, max_width: int) -> Lines:
    """The lines as they are where none is wider than this."""
    widths = np.minimum(lines.widths, max_width)
    if max_width > lines.max_width:
        for place in np.flatnonzero(lines.widths == lines.max_width):
            image = lines.source.image(int(lines.indices[place]))
            widths[place] = fitted_width(image, max_width)
    return replace(lines, max_width=max_width, widths=widths)


def _read_with_both(
    exported: Reader, network: Reader, lines: Lines
) -> tuple[list[Reading], float, int]:
    """What the export reads; and how far, over all frames and lines, the network is from it.

    Returns:
        The readings, the largest difference of a probability, and the number of texts that differ
        by more than the choice between equally probable classes.
    """
    found: list[Reading] = []
    difference, differing = 0.0, 0
    for batch in evaluation_batches(lines):
        pixels = pixels_of(batch)
        best, classes = exported.best_path(pixels)
        expected, expected_classes = network.best_path(pixels)
        # Unlike max, it hands on a probability that is no number.
        difference = float(np.maximum(difference, np.abs(best - expected).max()))
        widths = batch.widths.tolist()
        decoded = decode(exported, best, classes, widths)
        truths = decode(network, expected, expected_classes, widths)
        for row, (read, truth) in enumerate(zip(decoded, truths, strict=True)):
            if read.text != truth.text:
                own, other = classes[row], expected_classes[row]
                differing += not _are_tied(network, pixels[row : row + 1], own, other)
        found += _readings(batch, decoded)
    return found, difference, differing


def _are_tied(network: Reader, pixels: np.ndarray, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two best paths of a line (1, 32, W, 3) are equally probable, up to TOLERANCE."""
    assert network.probabilities
    line = network.probabilities(pixels)[0]
    frames = np.flatnonzero(one != other)
    gaps = line[frames, one[frames]] - line[frames, other[frames]]
    return bool(np.abs(gaps).max() <= TOLERANCE)


def opened(path: Path) -> Reader:
    """An export that reads on this stage's share of the cores: left to itself it takes them all."""
    return load_exported(path, torch.get_num_threads())


def read_exported(exported: Reader, batches: Iterable[Batch]) -> list[Reading]:
    """What an export makes of every line of the batches."""
    found = []
    for batch in batches:
        best_path = exported.best_path(pixels_of(batch))
        found += _readings(batch, decode(exported, *best_path, batch.widths.tolist()))
    return found


def _readings(batch: Batch, decoded: Iterable[Decoded]) -> list[Reading]:
    return [
        Reading(index, read.text, label, read.confidence)
        for index, label, read in zip(batch.indices, batch.labels, decoded, strict=True)
    ]


def write_errors(work: Work, readings: Iterable[Reading]) -> None:
    """Write down the lines that are read wrongly, for the report."""
    errors = [asdict(reading) for reading in readings if reading.text != reading.label]
    work.write_json(ERRORS, sorted(errors, key=lambda error: error["index"]))


def pixels_of(batch: Batch) -> np.ndarray:
    """The lines as an export takes them, (N, 32, W, 3), uint8."""
    pixels: np.ndarray = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def _provenance(work: Work) -> dict[str, Any]:
    """What the network was made of; its stage's key leads to the MLflow run."""
    inputs = {name: given["sha256"] for name, given in work.job["inputs"].items()}
    return {"made_of": inputs, **work.settings["of"]}
