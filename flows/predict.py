"""Reading images with a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crnn.checkpoint import load_checkpoint
from crnn.data.batches import Lines, evaluation_batches
from crnn.data.images import fitted_width
from crnn.data.sources import ImageFiles
from crnn.errors import DataError
from crnn.evaluation import read
from flows import project
from flows.cache import MODEL

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def predict(
    model: str, images: Sequence[Path]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Read every image.

    Args:
        model: Checkpoint file or MLflow URI of one, or of a run's artifact folder.
        images: Files and folders; of a folder, every image file below it.

    Returns:
        Readings (image, text, confidence) in the order given, and failures (image, reason).
    """
    checkpoint = load_checkpoint(_local(model))
    files = [file for place in images for file in _files(place)]
    source = ImageFiles(files)
    widths, failures = {}, []
    for index, file in enumerate(files):
        try:
            widths[index] = fitted_width(source.image(index), checkpoint.max_width)
        except DataError as error:
            failures.append({"image": str(file), "reason": str(error)})
    lines = Lines(
        source,
        np.array(list(widths), np.int64),
        np.array(list(widths.values()), np.int32),
        checkpoint.charset,
        checkpoint.max_width,
    )
    found = read(checkpoint.model, evaluation_batches(lines), checkpoint.charset)
    readings = [
        {"image": str(files[r.index]), "text": r.text, "confidence": round(r.confidence, 6)}
        for r in sorted(found, key=lambda reading: reading.index)
    ]
    return readings, failures


def _local(model: str) -> Path:
    if ":/" not in model:
        return Path(model)
    project.configure_environment()
    from flows.tracking import download

    path = download(model)
    return path / MODEL if path.is_dir() else path


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"folder {place} has no image files ({', '.join(sorted(SUFFIXES))})")
        return found
    if not place.exists():
        raise DataError(f"no image at {place}")
    return [place]
