"""One safetensors file for a network, and one for a training under way. No pickle anywhere.

The state dict is the architecture: a cut network is the same class with narrower layers, one of the
heads there are and residual blocks that may have lost their branch. So loading builds the network
from its settings, with the head and the blocks that its keys name, and gives every layer the shape
of its tensors.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from crnn.charset import Charset
from crnn.data.batches import normalise
from crnn.data.images import HEIGHT
from crnn.devices import layout_of
from crnn.errors import CheckpointError, UserError
from crnn.files import write_atomic
from crnn.networks.branches import Shortcut, drop_branches
from crnn.networks.heads import HeadWithRows, two_layer_head
from crnn.networks.recogniser import Recogniser
from crnn.reading import Reader
from crnn.settings import ModelSettings, TrainSettings
from crnn.training import Run, start

FORMAT = "crnn-slim/1"
METADATA = "crnn-slim"

DEPTHWISE = "is_depthwise"
"""Attribute of a convolution of a checkpoint: whether it is one in the uncut network."""


@dataclass(frozen=True)
class Checkpoint:
    """A network and what is needed to read a line with it.

    Attributes:
        model: In evaluation mode.
        charset: Meaning of its classes.
        max_width: Widest line in pixels, at 32 px high.
        stage: The stage that made it.
    """

    model: Recogniser
    charset: Charset
    max_width: int
    stage: str


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the network with its settings, charset and geometry."""
    write_atomic(path, checkpoint_bytes(checkpoint))


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """What save_checkpoint writes."""
    model = checkpoint.model
    metadata = {
        "format": FORMAT,
        "model": model.settings.model_dump_json(),
        "charset": checkpoint.charset.characters,
        "geometry": json.dumps(
            {
                "height": HEIGHT,
                "max_width": checkpoint.max_width,
                "stride": model.stride,
                **_strides(model),
            }
        ),
        "stage": checkpoint.stage,
    }
    return _serialised(model.state_dict(), metadata)


def _strides(model: Recogniser) -> dict[str, str]:
    """All strides of a network of timm, as one entry; nothing for VGG13, which has only one way."""
    found = getattr(model.cnn, "strides", None)
    return {"strides": json.dumps(found())} if found else {}


def _refuse_other_strides(model: Recogniser, geometry: dict[str, Any]) -> None:
    """Raise a CheckpointError where a network would not compute what it was trained to."""
    built = _strides(model)
    if built and "strides" not in geometry:
        raise CheckpointError(
            f"it was written before the strides of {model.settings.backbone} were kept with it;"
            " train it anew"
        )
    if built.items() - geometry.items():
        raise CheckpointError(
            f"this version of the program, or of timm, builds {model.settings.backbone} with other"
            " strides than it was trained with"
        )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a network of any widths.

    Raises:
        CheckpointError: No such file, not one of ours, or tensors that make no network.
    """
    tensors, metadata = _read(path)
    try:
        settings = ModelSettings.model_validate_json(metadata["model"])
        charset = Charset(metadata["charset"])
        geometry = json.loads(metadata["geometry"])
        max_width = int(geometry["max_width"])
        model = recogniser_of(settings, charset.classes, tensors)
        _refuse_other_strides(model, geometry)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} is unusable: {error}") from error
    except (KeyError, TypeError, ValueError, ValidationError, UserError) as error:
        reason = " ".join(repr(error).split())  # pydantic's has several lines.
        raise CheckpointError(f"checkpoint {path} has unusable metadata: {reason}") from error
    return Checkpoint(model, charset, max_width, metadata.get("stage", "?"))


def reader_of(checkpoint: Checkpoint) -> Reader:
    """What reads images with a checkpoint, in float32."""
    model = checkpoint.model.eval()

    @torch.inference_mode()
    def probabilities(pixels: np.ndarray) -> np.ndarray:
        images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(model.device))
        found: np.ndarray = model(images).softmax(2).permute(1, 0, 2).cpu().numpy()
        return found

    def best_path(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = probabilities(pixels)
        return found.max(2), found.argmax(2)

    width, stride = checkpoint.max_width, model.stride
    return Reader(best_path, probabilities, checkpoint.charset, width, stride, {})


def recogniser_of(settings: ModelSettings, classes: int, tensors: dict[str, Tensor]) -> Recogniser:
    """The network, in evaluation mode, whose state dict this is.

    Args:
        settings: Architecture before any cut: no layer may be wider.
        classes: K of the head.
        tensors: Are copied.

    Raises:
        CheckpointError: Other keys than such a network has, a layer that is wider than the settings
            say, a head of other classes, or layers that do not fit each other.
    """
    with torch.device("meta"):  # Shapes alone: absurd ones must not take memory.
        model = Recogniser(settings, classes)
        model.head = _head_like(_under("head.", tensors), 2 * settings.hidden, classes)
        drop_branches(model, {name.removesuffix(".constant") for name in tensors})
    _refuse_unfit(model, tensors)
    for name, module in model.named_modules():
        _resize_layer(module, _under(f"{name}.", tensors))
    # Of one layout: where an axis has length one, its stride chooses kernels that round otherwise.
    plain = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    try:
        model.rnn = _lstm_like(model.rnn, tensors["rnn.weight_ih_l0"])
        model.load_state_dict(plain, assign=True)
        model.eval()(torch.zeros(1, 3, HEIGHT, 32, dtype=model.dtype))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"the layers do not fit each other ({error})") from error
    return model


def _head_like(tensors: dict[str, Tensor], features: int, classes: int) -> nn.Module:
    """The head of such tensors, as large as it can be."""
    rank = min(features, classes)
    if "rows.weight" in tensors:
        rows = min(tensors["rows.weight"].shape[:1].numel(), classes)
        return HeadWithRows(features, rank, classes, rows)
    if "0.weight" in tensors:
        return two_layer_head(features, rank, classes)
    return nn.Linear(features, classes)


def _refuse_unfit(model: Recogniser, tensors: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    if tensors.keys() != expected.keys():
        missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        raise CheckpointError(f"missing tensors {sorted(missing)}, unknown {sorted(extra)}")
    for name in list(model.head.state_dict())[-2:]:  # Weight and bias of the last layer.
        tensor = tensors[f"head.{name}"]
        if tensor.ndim and len(tensor) != model.classes:
            raise CheckpointError(
                f"tensor head.{name} has {len(tensor)} rows, but the charset makes"
                f" {model.classes} classes"
            )
    for name, tensor in tensors.items():
        full = expected[name]
        both_float = tensor.is_floating_point() and full.is_floating_point()
        if tensor.dtype != full.dtype and not both_float:
            raise CheckpointError(f"tensor {name} is of {tensor.dtype}, not {full.dtype}")
        if tensor.ndim != full.ndim or not _within(tensor.shape, full.shape):
            raise CheckpointError(
                f"tensor {name} is {tuple(tensor.shape)}, at most {tuple(full.shape)} fits"
            )


def _within(shape: torch.Size, largest: torch.Size) -> bool:
    return all(1 <= n <= m for n, m in zip(shape, largest, strict=True))


def _resize_layer(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.out_channels > 1
        setattr(module, DEPTHWISE, depthwise)  # Of one channel its groups no longer tell.
        module.out_channels, inputs = tensors["weight"].shape[:2]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = inputs * module.groups
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(tensors["weight"])
        module.running_mean = torch.empty_like(tensors["running_mean"])
        module.running_var = torch.empty_like(tensors["running_var"])
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensors["weight"].shape
    elif not isinstance(module, Shortcut):
        return
    for name, _ in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(tensors[name])))


def _lstm_like(lstm: nn.LSTM, weight: Tensor) -> nn.LSTM:
    """An LSTM of as many layers whose first input weight, (4 x hidden, features), is like this."""
    gates, features = weight.shape
    return nn.LSTM(
        features,
        gates // 4,
        num_layers=lstm.num_layers,
        bidirectional=lstm.bidirectional,
        dtype=weight.dtype,
    )


def save_run(path: Path, run: Run) -> None:
    """Write a training under way: weights, the optimizer's moments, the penalty's memory."""
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors |= {f"memory.{name}": tensor for name, tensor in run.memory.items()}
    metadata = {"format": FORMAT, "epoch": str(run.epoch), "seed": str(run.seed)}
    write_atomic(path, _serialised(tensors, metadata))


def load_run(path: Path, model: Recogniser, settings: TrainSettings) -> Run:
    """Go on from what save_run wrote.

    Args:
        path: The file.
        model: Of the same architecture; its weights are replaced.
        settings: Of the same training.

    Raises:
        CheckpointError: The file is damaged, or of another network or training.
    """
    tensors, metadata = _read(path)
    try:
        return _run_of(tensors, metadata, model, settings)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not the state of this training: {error}") from error


def _run_of(
    tensors: dict[str, Tensor], metadata: dict[str, str], model: Recogniser, settings: TrainSettings
) -> Run:
    model.load_state_dict(_under("model.", tensors))
    run = start(model, settings, int(metadata["seed"]))
    state: dict[int, dict[str, Any]] = {}
    in_memory = layout_of(model)
    for name, tensor in _under("optimizer.", tensors).items():
        index, _, moment = name.partition(".")
        # In the layout they had: another one sums in another order.
        layout = in_memory if tensor.ndim == 4 else torch.contiguous_format
        state.setdefault(int(index), {})[moment] = tensor.contiguous(memory_format=layout)
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    run.epoch = int(metadata["epoch"])
    run.memory = {name: t.to(model.device) for name, t in _under("memory.", tensors).items()}
    return run


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file that is a function of its content.

    Safetensors takes contiguous tensors on the CPU. It writes its metadata in random order, so
    all of ours is the JSON text of one entry.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {METADATA: json.dumps(metadata, sort_keys=True)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is no checkpoint of this program (format"
                    f" {metadata.get('format')!r}, {FORMAT!r} is needed)"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
