"""A checkpoint of this program from the state dict of a VGG13 CRNN trained elsewhere."""

import re
import struct
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, recogniser_of
from crnn.errors import CheckpointError
from crnn.settings import ModelSettings

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state dict beside other things."""

UNREADABLE = (
    *(SafetensorError, UnpicklingError, struct.error, RuntimeError, EOFError),
    *(ValueError, LookupError, TypeError, AttributeError),
)
"""What a file that is no state dict leads its reader to raise."""

RULES = (
    (re.compile(r"(?:.*\.)?(?:features?|cnn)\.(\d+\.\w+)"), r"cnn.\1"),
    (re.compile(r"(?:.*\.)?((?:weight|bias)_[ih]h_l[01](?:_reverse)?)"), r"rnn.\1"),
    (re.compile(r"(?:.*\.)?(?:fc|linear|head|classifier|embedding)\.(weight|bias)"), r"head.\1"),
)
"""Keys of the layout, whatever stands before them, and what they are called here."""


def convert(path: Path, charset: Charset, max_width: int) -> Checkpoint:
    """Read a state dict of the layout of the article's VGG13: convolutions, LSTM, head.

    Layers may be narrower than the article's, as after a cut. Class 0 is the CTC blank.

    Args:
        path: What torch.save wrote, read without running any code of it, or safetensors.
        charset: Meaning of the classes from 1.
        max_width: Widest line in pixels that the network is to read, at 32 px high.

    Raises:
        CheckpointError: No such file, keys that have no place or are missing, or layers that do
            not fit each other.
    """
    tensors: dict[str, Tensor] = {}
    homeless = []
    for key, tensor in _state_dict(path).items():
        name = _name(key)
        if name is None or name in tensors:
            homeless.append(key)
        else:
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    if homeless:
        raise CheckpointError(
            f"{path}: these keys have no place in a VGG13 CRNN: {', '.join(homeless)}; rename them"
            " as the README shows, or leave them out"
        )
    for norm in [n for n in tensors if n.endswith(".running_mean")]:
        counter = f"{norm.rpartition('.')[0]}.num_batches_tracked"
        tensors.setdefault(counter, torch.tensor(0))  # Old versions of torch did not save it.
    recurrent = tensors.get("rnn.weight_hh_l0")
    if recurrent is None or recurrent.ndim != 2:
        raise CheckpointError(f"{path} has no LSTM (weight_hh_l0 is missing)")
    try:
        settings = ModelSettings(hidden=recurrent.shape[1])
        model = recogniser_of(settings, charset.classes, tensors)
    except (CheckpointError, ValidationError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else error.errors()[0]["msg"]
        raise CheckpointError(f"{path} is no VGG13 CRNN: {reason}") from error
    return Checkpoint(model, charset, max_width, "converted")


def _name(key: str) -> str | None:
    return next((rule.sub(new, key) for rule, new in RULES if rule.fullmatch(key)), None)


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no state dict at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # The sentence below says it.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} is no plain state dict: it is damaged, or holds more than tensors, as a whole"
            " model does; save model.state_dict() with torch.save"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()
    ):
        raise CheckpointError(f"{path} is no plain state dict: names with tensors are needed")
    return content
