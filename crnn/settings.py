"""What can be set about data, the model and training. Frozen; unknown keys are refused.

Every field here changes the result, so each is part of a stage's cache key. What does not
(devices, loader workers, paths) is decided elsewhere.
"""

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

PLAIN_ALPHABET = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Digits and capitals without I and O, which many fonts draw like 1 and 0."""

VGG13 = "vgg13"
"""The backbone of the article, the only one with a width factor."""

Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: immutable, and a mistyped key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = (kind, *get_args(kind))
        is_section = any(isinstance(k, type) and issubclass(k, Settings) for k in kinds)
        if isinstance(value, bool) and bool not in kinds and not (value and is_section):
            off = value is False and type(None) in kinds
            raise ValueError("null switches it off" if off else "takes no true or false")
        return value


class TextSettings(Settings):
    """Rendered text: random strings over an alphabet."""

    alphabet: Annotated[str, Field(min_length=1)] = PLAIN_ALPHABET
    min_length: Annotated[int, Field(ge=1)] = 3
    max_length: Annotated[int, Field(ge=1, le=40)] = 8

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length is at most max_length; {self.min_length} > {self.max_length}"
            )
        return self


class AugmentSettings(Settings):
    """Probability of each change to a training image; 0 switches it off."""

    affine: Share = 0.5
    blur: Share = 0.2
    noise: Share = 0.3
    contrast: Share = 0.5
    jpeg: Share = 0.2


class DataSettings(Settings):
    """Where the lines come from and how they become tensors.

    train and val each name a label file (`path<TAB>label` lines), an LMDB folder, or, as a
    number, how many lines to render. Names are relative to root. Image paths that lead out of
    root, absolute ones included, are refused unless allow_outside_root says otherwise. licence is
    for the model card alone.
    """

    root: str = "."
    train: str | Annotated[int, Field(ge=1, strict=True)]
    val: str | Annotated[int, Field(ge=1, strict=True)]
    charset: str | None = None
    text: TextSettings = TextSettings()
    max_width: Annotated[int, Field(ge=32, le=2048)] = 320
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    allow_outside_root: bool = False
    licence: str | None = None


class ModelSettings(Settings):
    """Architecture before any cut.

    backbone is vgg13, whose channels width multiplies, or the name of a convolutional network of
    timm, which has the channels it has. hidden is the number of units of each of the two LSTM
    layers in each direction.
    """

    backbone: str = VGG13
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    hidden: Annotated[int, Field(ge=1, le=1024)] = 48

    @field_validator("backbone")
    @classmethod
    def _named_as_timm_names(cls, name: str) -> str:
        fitting = re.sub(r"[^a-z0-9_.]", "_", name.lower())
        if not name or name != fitting:
            raise ValueError(
                f"a backbone has small letters, digits, _ and . in its name; did you mean"
                f" {fitting or VGG13}?"
            )
        return name

    @model_validator(mode="after")
    def _width_of_vgg13_alone(self) -> Self:
        if self.width != 1 and self.backbone != VGG13:
            raise ValueError(
                f"width is for {VGG13} alone; {self.backbone} has no other than 1, not"
                f" {self.width:g}"
            )
        return self


class TrainSettings(Settings):
    """One run of the training loop: AdamW on a one-cycle schedule.

    The learning rate rises to learning_rate over the first warmup of all steps and falls to zero by
    the last. clip_norm is the largest norm of the gradient. precision auto is mixed, where the
    machine computes faster so.
    """

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup: Share = 0.15
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 5.0
    precision: Literal["auto", "float32"] = "auto"
    augment: AugmentSettings = AugmentSettings()


class BaselineSettings(TrainSettings):
    """The baseline stage. From a checkpoint it may also train no epoch at all.

    distill is the weight of learning from the experiment's teacher beside the labels.
    """

    epochs: Annotated[int, Field(ge=0)]
    checkpoint: str | None = None
    distill: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _trained_somewhere(self) -> Self:
        if self.epochs == 0 and self.checkpoint is None:
            raise ValueError("epochs may be 0 only where a checkpoint is given")
        return self


class ExportSettings(Settings):
    """What is inside an exported network.

    With normalise it takes pixels, uint8 (N, 32, W, 3), else images, float32 (N, 3, 32, W) in
    [-1, 1]. It gives the probabilities, float32 (N, T, K), or the classes of the best path, int64
    (N, T), with their probabilities. With pt2 there is torch.export's file beside the ONNX file.
    """

    normalise: bool = True
    output: Literal["probabilities", "classes"] = "probabilities"
    pt2: bool = False


class QuantizeSettings(TrainSettings):
    """How exported networks become int8.

    max_drop is what it may cost on judged_lines augmented training lines, in points of word
    accuracy; layers are left in float until it does not cost more. calibration_lines give the
    ranges of the activations. Where layers were left in float, the network is trained on for
    epochs with rounding, all of TrainSettings applies to that; 0 for not at all.
    """

    epochs: Annotated[int, Field(ge=0)] = 2
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    max_drop: Annotated[float, Field(ge=0)] = 0.3
    calibration_lines: Annotated[int, Field(ge=1)] = 256
    judged_lines: Annotated[int, Field(ge=1)] = 2000


class TeacherSettings(BaselineSettings):
    """A network that teaches the others, and how it is trained itself, or its checkpoint."""

    model: ModelSettings = ModelSettings()

    @model_validator(mode="after")
    def _has_no_teacher(self) -> Self:
        if self.distill is not None:
            raise ValueError("distill is for those who are taught, and a teacher is not")
        if self.checkpoint and self.model != ModelSettings():
            raise ValueError("the checkpoint says what the teacher is: leave out model, or it")
        return self
