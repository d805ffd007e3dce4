"""Reading images with a checkpoint or an export, which needs no torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from crnn.beam import BeamSearch, Lexicon, NGram
from crnn.charset import Charset
from crnn.data.images import decode, fit_line
from crnn.errors import DataError
from crnn.reading import Reader, load_exported, read_images
from flows import project
from flows.cache import MODEL, ONNX

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

AT_ONCE = 1024
"""Images that are in memory at a time, scaled to lines."""


@dataclass(frozen=True)
class Decoding:
    """How lines are decoded, greedily unless something is set.

    Attributes:
        beam: Texts that beam search follows; 0: no beam search, unless a file asks for it.
        lexicon: File of the texts that can be read, one a line.
        language: File of example texts, one a line or a label file, for a character n-gram.
    """

    beam: int = 0
    lexicon: Path | None = None
    language: Path | None = None


def predict(
    model: str, images: Sequence[Path], decoding: Decoding = Decoding()
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Read every image.

    Args:
        model: Checkpoint, ONNX file, or MLflow URI of one, or of a run's artifact folder.
        images: Files and folders; of a folder, every image file below it.
        decoding: How.

    Returns:
        Readings (image, text, confidence, characters) in the order given, and failures (image,
        reason).
    """
    path = _local(model)
    reader = _reader(path)
    beam = _beam(decoding, reader.charset)
    files = [file for place in images for file in _files(place)]
    readings, failures = [], []
    for start in range(0, len(files), AT_ONCE):
        opened: list[tuple[Path, Image.Image]] = []
        for file in files[start : start + AT_ONCE]:
            try:
                opened.append((file, fit_line(_open(file), reader.max_width)))
            except DataError as error:
                failures.append({"image": str(file), "reason": str(error)})
        found = read_images(reader, [image for _, image in opened], beam)
        for (file, _), read in zip(opened, found, strict=True):
            readings.append(
                {
                    "image": str(file),
                    "text": read.text,
                    "confidence": round(read.confidence, 6),
                    "characters": [round(share, 6) for share in read.characters],
                }
            )
    return readings, failures


def _beam(decoding: Decoding, charset: Charset) -> BeamSearch | None:
    """The search that was asked for; None: greedy decoding."""
    if decoding == Decoding():
        return None
    lexicon = language = None
    if decoding.lexicon:
        lexicon = Lexicon(_texts(decoding.lexicon), charset)
        if not len(lexicon):
            raise DataError(f"no text of {decoding.lexicon} is in the charset of the model")
        if lost := lexicon.unreadable:
            sys.stderr.write(
                f"{len(lost)} of {len(lost) + len(lexicon)} texts in {decoding.lexicon} have"
                f" characters that the model does not read, such as {lost[0]!r}: no image is read"
                " as one of them\n"
            )
    if decoding.language:
        language = NGram(_texts(decoding.language), charset)
    width = decoding.beam or BeamSearch.width
    return BeamSearch(width=width, lexicon=lexicon, language=language)


def _texts(path: Path) -> list[str]:
    """Lines of a file; of a label file the labels."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from error
    return [line.split("\t", 1)[-1] for line in lines if line]


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
