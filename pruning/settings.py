"""What can be set about sparsity and cutting."""

from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from crnn.settings import Settings, TrainSettings


class SparseSettings(TrainSettings):
    """The sparse stage: training with a penalty on the BatchNorm scales.

    method `auto` drives target_ratio of the channels to exact zeros by itself. The others need a
    strength, s of Network Slimming: `subgradient` adds s x sign(gamma) to the gradient (the
    article took 1e-4, the quickstart's few epochs need 0.1), `proximal` shrinks |gamma| by learning
    rate x s after each step (the quickstart needs 0.8), `polarization` pushes small gammas to 0 and
    large ones to 1 in the same way. distill is the weight of learning from the teacher, else the
    baseline, beside the labels, 0 for not at all. from_baseline: false starts with fresh weights;
    without a teacher section nothing teaches then.

    `auto` leaves every layer some channels. With drop_branches it may take all that are inside a
    residual block of two convolutions (resnet18, resnet34) or an inverted one (MobileNetV2 and V3,
    EfficientNet); a cut then leaves the shortcut.
    """

    method: Literal["auto", "subgradient", "proximal", "polarization"] = "auto"
    target_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.87
    strength: Annotated[float, Field(ge=0)] | None = None
    from_baseline: bool = True
    distill: Annotated[float, Field(ge=0)] = 1.0
    drop_branches: bool = False

    @model_validator(mode="after")
    def _branches_go_with_auto(self) -> Self:
        if self.drop_branches and self.method != "auto":
            raise ValueError(
                f"drop_branches needs method auto, not {self.method}: no other takes a channel's"
                " beta to zero with its gamma"
            )
        return self

    @model_validator(mode="after")
    def _strength_where_it_is_used(self) -> Self:
        if (self.strength is None) != (self.method == "auto"):
            raise ValueError(
                "strength is for the methods subgradient, proximal and polarization, which need it,"
                f" and for no other; method {self.method}, strength {self.strength}"
            )
        return self


class FinetuneSettings(TrainSettings):
    """The fine-tuning of a cut network, which may also be left as it was cut.

    distill is the weight of learning from the teacher, else the baseline, 0 for not at all;
    recalibrate is the number of training lines, unchanged by augmentation, from which the
    BatchNorm statistics are estimated anew at the end, 0 for what the epochs left.
    """

    epochs: Annotated[int, Field(ge=0)]
    distill: Annotated[float, Field(ge=0)] = 0.0
    recalibrate: Annotated[int, Field(ge=0)] = 0


class Targets(Settings):
    """Wishes that each get a point of their own, at the lowest ratio that meets them.

    size_mb is the checkpoint's, 10^6 bytes; macs and latency_ms (one CPU thread) are those of one
    line of 32 x 128 px.
    """

    size_mb: Annotated[float, Field(gt=0)] | None = None
    params: Annotated[int, Field(gt=0)] | None = None
    macs: Annotated[int, Field(gt=0)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None

    def wishes(self) -> dict[str, float]:
        """Those that were set, by key."""
        return self.model_dump(exclude_none=True)


def units_removed(hidden: int, ratio: float) -> int:
    """How many of the hidden units of an LSTM's layer and direction a lstm_ratio takes."""
    return int(hidden * Decimal(str(ratio)))


class PruneSettings(Settings):
    """Selection of channels and the cut.

    Every layer keeps at least min_channels and a share of min_ratio, and, under selection exact, a
    multiple of round_to, as the vector units of a CPU like it, or all it has; but a branch that
    sparse.drop_branches has left without a live channel may go, under exact. Live channels do not
    go for a multiple's sake while enough are dead: the cut is then smaller than its ratio.

    With compensate, what is removed goes on over calibration_lines training lines: a channel that
    was not zero as a constant, its mean, and a hidden unit as what the others say of it; a
    head_rank is spent on what the network reads there, and head_rows go to the classes that it
    reads most. Without, weights alone decide about both.

    lstm_ratio is the share of the hidden units that every layer and direction of the LSTM loses;
    with a head_rank the head becomes two layers with so many numbers a frame between them, and
    head_rows classes keep their row of weights besides.
    """

    targets: Targets = Targets()
    selection: Literal["exact", "reference"] = "exact"
    min_channels: Annotated[int, Field(ge=1)] = 1
    min_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    round_to: Annotated[int, Field(ge=1, le=64)] = 1
    compensate: bool = True
    calibration_lines: Annotated[int, Field(ge=1)] = 512
    lstm_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head_rank: Annotated[int, Field(ge=1)] | None = None
    head_rows: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _rows_are_beside_a_rank(self) -> Self:
        if self.head_rows and self.head_rank is None:
            raise ValueError(
                f"head_rows {self.head_rows} needs a head_rank, for the classes without a row"
            )
        return self

    @model_validator(mode="after")
    def _reference_does_not_round(self) -> Self:
        if self.selection == "reference" and self.round_to > 1:
            raise ValueError(
                f"round_to {self.round_to} needs selection exact; reference does what the"
                " published code does, which rounds nothing"
            )
        return self
