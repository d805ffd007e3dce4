"""From a checkpoint to an ONNX file, and to torch.export's.

The ONNX exporter that is built on torch.export unrolls an LSTM over the frames of its example, so
that its files would read lines of one width: the older exporter makes them.
"""

import copy
import hashlib
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from crnn.checkpoint import Checkpoint
from crnn.data.batches import normalise
from crnn.data.images import BUCKET, HEIGHT
from crnn.files import write_atomic
from crnn.networks.deploy import deployed
from crnn.networks.recogniser import Recogniser
from crnn.reading import CLASSES, DIGEST, FORMAT, IMAGES, METADATA, PIXELS, PROBABILITIES
from crnn.settings import ExportSettings

OPSET = 17

TILE = 32
"""Classes that are compared at once."""

NEVER = -1e4
"""Logit of a class whose probability is 0."""

NARROWEST = 32
"""Pixels of the narrowest batch that torch.export's file reads."""

PROGRAM_FORMAT = "crnn-slim-pt2/1"


class Shipped(nn.Module):
    """What an exported file computes: the recogniser between its pixels and its probabilities.

    Attributes:
        recogniser: In its deployed form.
        settings: What is inside the file besides.
    """

    def __init__(self, recogniser: Recogniser, settings: ExportSettings) -> None:
        super().__init__()
        self.recogniser = deployed(recogniser) or recogniser
        self.settings = settings

    def forward(self, given: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Pixels (N, 32, W, 3), or images (N, 3, 32, W), to what the settings say, batch first."""
        images = normalise(given.permute(0, 3, 1, 2)) if self.settings.normalise else given
        frames, _ = self.recogniser.rnn(self.recogniser.features(images))
        probabilities = self.logits(frames.transpose(0, 1)).softmax(2)
        if self.settings.output == PROBABILITIES:
            return probabilities
        return self.best(probabilities)

    def logits(self, frames: Tensor) -> Tensor:
        """What the LSTM gives, (N, T, C), to (N, T, K)."""
        logits: Tensor = self.recogniser.head(frames)
        return logits

    def best(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Class and probability of the best of each frame, (N, T) both."""
        best, classes = probabilities.max(2)
        return classes, best


class _ForOnnxruntime(Shipped):
    """The same, in operations at which onnxruntime is fast."""

    def __init__(self, recogniser: Recogniser, settings: ExportSettings) -> None:
        super().__init__(recogniser, settings)
        whole = settings.output == PROBABILITIES
        self.head = self.recogniser.head if whole else _filled_up(self.recogniser.head)

    def logits(self, frames: Tensor) -> Tensor:
        """A layer of the head that is given a matrix is one operation, its bias included."""
        lines, steps = frames.shape[:2]
        flat: Tensor = self.head(frames.flatten(0, 1))
        return flat.reshape(lines, steps, -1)

    def best(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """First the best tile, then the best class in it.

        The largest of many values is found many at a time, its place one by one.
        """
        tiles = probabilities.reshape(*probabilities.shape[:2], -1, TILE)
        best, tile = tiles.amax(3).topk(1, 2)
        places = tile.unsqueeze(3).expand(-1, -1, -1, TILE)
        place = tiles.gather(2, places).topk(1, 3).indices
        return (tile * TILE + place.flatten(2)).flatten(1), best.flatten(1)


def _filled_up(head: nn.Module) -> nn.Module:
    """A head with classes of no probability behind its own, up to a multiple of TILE."""
    filled = copy.deepcopy(head)
    *_, last = filled.modules()
    assert isinstance(last, nn.Linear)
    more = -last.out_features % TILE
    last.weight = nn.Parameter(F.pad(last.weight.detach(), (0, 0, 0, more)))
    last.bias = nn.Parameter(F.pad(last.bias.detach(), (0, more), value=NEVER))
    return filled


def export_onnx(
    path: Path, checkpoint: Checkpoint, settings: ExportSettings, provenance: dict[str, Any]
) -> None:
    """Write an ONNX file with dynamic batch and width.

    Args:
        path: The file.
        checkpoint: The network, on the CPU.
        settings: What goes inside.
        provenance: Goes into the metadata as it is, beside charset and geometry.
    """
    shipped = _ForOnnxruntime(checkpoint.model, settings).eval()
    name = PIXELS if settings.normalise else IMAGES
    outputs = [PROBABILITIES] if settings.output == PROBABILITIES else [CLASSES, "confidences"]
    axes = {name: {0: "N", (2 if settings.normalise else 3): "W"}}
    axes |= {output: {0: "N", 1: "T"} for output in outputs}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        # What is ignored: that there is a newer exporter, and that a traced batch could be fixed.
        torch.onnx.export(
            shipped,
            (example(settings),),
            Path(folder) / "network.onnx",
            input_names=[name],
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
        network = onnx.load_model(Path(folder) / "network.onnx")
    made_by = {"format": FORMAT, "exporter": "torch.onnx, TorchScript", "opset": OPSET}
    content = _metadata(checkpoint, provenance, made_by)
    for key, value in (
        (METADATA, content),
        (DIGEST, hashlib.sha256(content.encode()).hexdigest()),
    ):
        network.metadata_props.add(key=key, value=value)
    write_atomic(path, network.SerializeToString(deterministic=True))


def export_program(
    path: Path, checkpoint: Checkpoint, settings: ExportSettings, provenance: dict[str, Any]
) -> None:
    """Write what torch.export makes of a network, .pt2, with dynamic batch and width.

    `torch.export.load(path).module(check_guards=False)` reads it: its guards would hold it to the
    width of its example, and to more than one line, though it computes any.

    Args:
        path: The file; charset and geometry are in it, as "crnn-slim.json".
        checkpoint: The network, on the CPU.
        settings: What goes inside.
        provenance: Goes into the metadata as it is.
    """
    shipped = Shipped(copy.deepcopy(checkpoint.model), settings).eval()
    lines, sixteens = Dim("N", min=1, max=4096), Dim("W16", min=NARROWEST // BUCKET, max=1024)
    shape = {0: lines, (2 if settings.normalise else 3): BUCKET * sixteens}
    made_by = {"format": PROGRAM_FORMAT, "exporter": f"torch.export {torch.__version__}"}
    content = _metadata(checkpoint, provenance, made_by)
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # That an LSTM keeps a list of its weights.
        program = torch.export.export(shipped, (example(settings),), dynamic_shapes=(shape,))
        program.example_inputs = None  # They would be in the file, pickled.
        torch.export.save(program, buffer, extra_files={f"{METADATA}.json": content})
    write_atomic(path, buffer.getvalue())


def example(settings: ExportSettings) -> Tensor:
    """Two lines to trace a network with."""
    if settings.normalise:
        return torch.zeros(2, HEIGHT, 64, 3, dtype=torch.uint8)
    return torch.zeros(2, 3, HEIGHT, 64)


def _metadata(checkpoint: Checkpoint, provenance: dict[str, Any], made_by: dict[str, Any]) -> str:
    """What a file says of itself, JSON."""
    stride = checkpoint.model.stride
    content = {
        "charset": checkpoint.charset.characters,
        "classes": checkpoint.model.classes,
        "geometry": {"height": HEIGHT, "max_width": checkpoint.max_width, "stride": stride},
        "provenance": provenance,
        **made_by,
    }
    # A charset of thousands of characters is half as long without escapes.
    return json.dumps(content, sort_keys=True, ensure_ascii=False)
