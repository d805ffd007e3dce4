"""Reading images with a checkpoint or an export, which needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from crnn.data.images import decode
from crnn.errors import DataError
from crnn.reading import Reader, load_exported, read_images
from flows import project
from flows.cache import MODEL, ONNX

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

AT_ONCE = 1024
"""Images that are in memory at a time."""


def predict(
    model: str, images: Sequence[Path]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Read every image.

    Args:
        model: Checkpoint, ONNX file, or MLflow URI of one, or of a run's artifact folder.
        images: Files and folders; of a folder, every image file below it.

    Returns:
        Readings (image, text, confidence) in the order given, and failures (image, reason).
    """
    path = _local(model)
    reader = _reader(path)
    files = [file for place in images for file in _files(place)]
    readings, failures = [], []
    for start in range(0, len(files), AT_ONCE):
        opened: dict[Path, Image.Image] = {}
        for file in files[start : start + AT_ONCE]:
            try:
                opened[file] = _open(file)
            except DataError as error:
                failures.append({"image": str(file), "reason": str(error)})
        for file, (text, confidence) in zip(
            opened, read_images(reader, list(opened.values())), strict=True
        ):
            reading = {"image": str(file), "text": text, "confidence": round(confidence, 6)}
            readings.append(reading)
    return readings, failures


def _reader(path: Path) -> Reader:
    if path.suffix == ".onnx":
        return load_exported(path)
    from crnn.checkpoint import load_checkpoint, reader_of

    return reader_of(load_checkpoint(path))


def _local(model: str) -> Path:
    if ":/" not in model:
        return Path(model)
    project.configure_environment()
    from flows.tracking import download

    path = download(model)
    if not path.is_dir():
        return path
    served = path / "artifacts" / ONNX
    return served if served.exists() else path / MODEL


def _open(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"folder {place} has no image files ({', '.join(sorted(SUFFIXES))})")
        return found
    if not place.exists():
        raise DataError(f"no image at {place}")
    return [place]
