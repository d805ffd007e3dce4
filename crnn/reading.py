"""Reading lines. With an exported network it takes onnxruntime and numpy alone, no torch."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image

from crnn.charset import BLANK, Charset
from crnn.data.images import BUCKET, HEIGHT, fit_line, pad_lines
from crnn.errors import CheckpointError

if TYPE_CHECKING:
    from crnn.beam import BeamSearch

FORMAT = "crnn-slim-onnx/1"
METADATA, DIGEST = "crnn-slim", "crnn-slim.sha256"
"""Names of the metadata in the file, JSON, and of its SHA-256."""

PIXELS, IMAGES = "pixels", "images"
"""Names of the input: uint8 (N, 32, W, 3); or float32 (N, 3, 32, W) in [-1, 1]."""

PROBABILITIES, CLASSES = "probabilities", "classes"
"""What comes out: float32 (N, T, K); or int64 (N, T) with the float32 confidences (N, T)."""

BATCH = 32


@dataclass(frozen=True)
class Reader:
    """What turns lines into text.

    Attributes:
        best_path: Pixels (N, 32, W, 3), uint8, to the largest probability of every frame and its
            class, (N, T) both.
        probabilities: The same pixels to those of all classes, (N, T, K); None where an export has
            the best path inside.
        charset: Meaning of the classes.
        max_width: Widest line in pixels, at 32 px high.
        stride: Pixels for each frame.
        provenance: Where the network came from.
    """

    best_path: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    probabilities: Callable[[np.ndarray], np.ndarray] | None
    charset: Charset
    max_width: int
    stride: int
    provenance: dict[str, Any]


class Decoded(NamedTuple):
    """What was read on a line.

    Attributes:
        text: In the characters of the charset.
        confidence: In [0, 1]: by greedy decoding the product over the frames of the largest
            probability, by beam search the probability of the text.
        characters: For each character the largest probability that a frame gave it, in [0, 1].
    """

    text: str
    confidence: float
    characters: list[float]


def read_images(
    reader: Reader, images: Iterable[Image.Image], beam: "BeamSearch | None" = None
) -> list[Decoded]:
    """What is on each image, in the order given.

    Args:
        reader: The network.
        images: RGB, of any size; each is scaled before the next one is asked for.
        beam: How to decode; None: greedily.

    Raises:
        CheckpointError: Beam search with an export that gives the best path alone.
    """
    lines = [np.asarray(fit_line(image, reader.max_width)) for image in images]
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        buckets[-(-line.shape[1] // BUCKET)].append(number)
    found: dict[int, Decoded] = {}
    for _, numbers in sorted(buckets.items()):
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            pixels = pad_lines([lines[n] for n in chosen])
            widths = [lines[number].shape[1] for number in chosen]
            if beam:
                decoded = search(reader, beam, pixels, widths)
            else:
                decoded = decode(reader, *reader.best_path(pixels), widths)
            found |= zip(chosen, decoded, strict=True)
    return [found[number] for number in range(len(lines))]


def search(
    reader: Reader, beam: "BeamSearch", pixels: np.ndarray, widths: Sequence[int]
) -> list[Decoded]:
    """Lines by beam search.

    Args:
        reader: The network.
        beam: How to search.
        pixels: (N, 32, W, 3), uint8.
        widths: Of the lines in pixels, padding not counted, N of them.
    """
    if reader.probabilities is None:
        raise CheckpointError(
            "beam search needs all probabilities, and this export gives the best path alone; make"
            " it with export.output: probabilities"
        )
    decoded = []
    for row, width in zip(reader.probabilities(pixels), widths, strict=True):
        classes, confidence, characters = beam.read(row[: _frames(reader, width)])
        text = "".join(reader.charset.characters[number - 1] for number in classes)
        decoded.append(Decoded(text, confidence, characters))
    return decoded


def decode(
    reader: Reader, best: np.ndarray, classes: np.ndarray, widths: Sequence[int]
) -> list[Decoded]:
    """Lines by greedy decoding, each from its own frames of the best path.

    Args:
        reader: Its charset and stride.
        best: Largest probability of every frame, (N, T).
        classes: Its class, (N, T).
        widths: Of the lines in pixels, padding not counted, N of them.
    """
    decoded = []
    for row, width in enumerate(widths):
        frames = _frames(reader, width)
        own, probabilities = classes[row, :frames].tolist(), best[row, :frames]
        confidence = float(probabilities.prod(dtype=np.float64))
        runs = groupby(zip(own, probabilities.tolist(), strict=True), key=lambda frame: frame[0])
        characters = [max(p for _, p in run) for number, run in runs if number != BLANK]
        decoded.append(Decoded(reader.charset.decode(own), confidence, characters))
    return decoded


def _frames(reader: Reader, width: int) -> int:
    """Frames that belong to a line of so many pixels."""
    return max(1, width // reader.stride)


def load_exported(path: Path, threads: int = 0) -> Reader:
    """Open a file that crnn.export wrote.

    Args:
        path: The file.
        threads: Of the computation; 0 lets onnxruntime choose.

    Raises:
        CheckpointError: No such file, no network, not one of ours, or altered metadata.
    """
    if not path.is_file():
        raise CheckpointError(f"no model file at {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads slow down whoever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, without a common one.
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is no ONNX network that can be run ({reason})") from error
    entries = session.get_modelmeta().custom_metadata_map
    content = entries.get(METADATA, "")
    if hashlib.sha256(content.encode()).hexdigest() != entries.get(DIGEST):
        raise CheckpointError(
            f"{path} is no export of this program: its metadata is missing or has been altered"
        )
    metadata = json.loads(content)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, {FORMAT!r} is needed; export it again"
        )
    geometry = metadata["geometry"]
    charset = Charset(metadata["charset"])
    if geometry["height"] != HEIGHT or metadata["classes"] != charset.classes:
        raise CheckpointError(f"{path} contradicts itself: {geometry}, {charset.classes} classes")
    width, stride = geometry["max_width"], geometry["stride"]
    has_all = session.get_outputs()[0].name == PROBABILITIES
    probabilities = partial(_probabilities, session) if has_all else None
    origin = metadata["provenance"]
    return Reader(partial(_best_path, session), probabilities, charset, width, stride, origin)


def _best_path(
    session: onnxruntime.InferenceSession, pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    outputs = _run(session, pixels)
    if len(outputs) == 2:
        classes, best = outputs
        return best, classes
    return outputs[0].max(2), outputs[0].argmax(2)


def _probabilities(session: onnxruntime.InferenceSession, pixels: np.ndarray) -> np.ndarray:
    return _run(session, pixels)[0]


def _run(session: onnxruntime.InferenceSession, pixels: np.ndarray) -> list[np.ndarray]:
    name = session.get_inputs()[0].name
    given = pixels if name == PIXELS else normalised(pixels)
    outputs: list[np.ndarray] = session.run(None, {name: given})
    return outputs


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Pixels (N, 32, W, 3), uint8, to images (N, 3, 32, W), float32 in [-1, 1]."""
    scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
