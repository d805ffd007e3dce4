"""A look at every sample before training: what cannot be used is counted and listed."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from crnn.charset import Charset
from crnn.data.images import scaled_width
from crnn.data.sources import Source, open_source
from crnn.errors import DataError
from crnn.settings import DataSettings

LISTED = 10
"""Bad samples that an error names before it refers to the rest by number."""


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on, and why.

    Attributes:
        split: "train" or "val".
        name: Its path or key.
        reason: The kind of fault, the same words for every sample that has it.
        detail: What is particular to this one.
    """

    split: str
    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Checked:
    """The outcome for one split.

    Attributes:
        source: What was looked at.
        indices: (S,) int64, the usable samples.
        widths: (S,) int32, their widths at 32 px high, in pixels.
        bad: The others.
        squeezed: How many of the usable ones are wider than the widest line allowed.
        widest: Of the usable ones, in pixels, before they are squeezed.
    """

    source: Source
    indices: np.ndarray
    widths: np.ndarray
    bad: list[BadSample]
    squeezed: int
    widest: int

    @property
    def counts(self) -> dict[str, int]:
        """Samples in all, usable, bad and squeezed, and the width of the widest."""
        return {
            "total": len(self.indices) + len(self.bad),
            "usable": len(self.indices),
            "bad": len(self.bad),
            "squeezed": self.squeezed,
            "widest_px": self.widest,
        }


@dataclass(frozen=True)
class CheckedData:
    """The outcome for a data set.

    Attributes:
        charset: As given, or the characters of the training labels.
        splits: "train" and "val".
    """

    charset: Charset
    splits: dict[str, Checked]


def check_splits(
    settings: DataSettings,
    seed: int,
    charset: Charset | None,
    stride: int,
    on_sample: Callable[[str, int, int], None] | None = None,
) -> CheckedData:
    """Decode every image and test every label of both splits.

    Args:
        settings: Where the samples are.
        seed: Of rendered text.
        charset: Characters a label may have; None takes those of the training labels.
        stride: Pixels for each CTC frame.
        on_sample: Called with (split, samples done, samples in all).
    """
    sources = {split: open_source(settings, split, seed) for split in ("train", "val")}
    charset = charset or training_charset(sources["train"])
    splits = {}
    for split, source in sources.items():
        on_one = partial(on_sample, split) if on_sample else None
        splits[split] = check_split(split, source, charset, (settings.max_width, stride), on_one)
    return CheckedData(charset, splits)


def needed_frames(label: str) -> int:
    """Frames CTC needs: one a character, and a blank between equal neighbours."""
    return len(label) + sum(a == b for a, b in pairwise(label))


def check_split(
    split: str,
    source: Source,
    charset: Charset,
    geometry: tuple[int, int],
    on_sample: Callable[[int, int], None] | None = None,
) -> Checked:
    """Decode every image and test every label.

    Args:
        split: Name of the split, for the list.
        source: Its samples.
        charset: Characters a label may have.
        geometry: Widest line, and stride of a CTC frame, in pixels.
        on_sample: Called with (samples done, samples in all).
    """
    max_width, stride = geometry
    indices, found = array("q"), array("i")
    bad: list[BadSample] = []
    for index in range(len(source)):
        try:
            label = source.label(index)
            width = scaled_width(source.image(index))
            fault = _fault(label, charset, width // stride, max_width // stride)
        except DataError as error:
            fault = ("unreadable", str(error))
        if fault:
            bad.append(BadSample(split, source.name(index), *fault))
        else:
            indices.append(index)
            found.append(width)
        if on_sample:
            on_sample(index + 1, len(source))
    widths = np.frombuffer(found, np.int32)
    return Checked(
        source=source,
        indices=np.frombuffer(indices, np.int64),
        widths=np.minimum(widths, np.int32(max_width)),
        bad=bad,
        squeezed=int((widths > max_width).sum()),
        widest=int(widths.max(initial=0)),
    )


def _fault(label: str, charset: Charset, frames: int, most: int) -> tuple[str, str] | None:
    """Why a sample cannot be used; frames are those of its image as wide as it is."""
    if not label:
        return "empty label", "the text after the tab is empty"
    if unknown := charset.unknown(label):
        return "characters outside the charset", f"{unknown!r} in {label!r}"
    if min(frames, most) < needed_frames(label):
        squeezed = f"'s {frames} are squeezed to {most} by data.max_width"
        has = f" has {frames}" if frames <= most else squeezed
        return (
            "label too long for CTC",
            f"{label!r} needs {needed_frames(label)} frames, the image{has}",
        )
    return None


def refuse_bad(splits: dict[str, Checked]) -> None:
    """Raise a DataError that counts the bad samples by reason and names the first ten."""
    bad = [sample for check in splits.values() for sample in check.bad]
    if not bad:
        return
    total = sum(check.counts["total"] for check in splits.values())
    reasons = Counter(sample.reason for sample in bad)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    listed = "".join(f"\n  {b.split} {b.name}: {b.reason} ({b.detail})" for b in bad[:LISTED])
    more = f"\n  and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    raise DataError(
        f"{len(bad)} of {total} samples cannot be used ({counts}); mend"
        f" them, or leave them out with --set data.on_bad_sample=skip:{listed}{more}"
    )


def refuse_empty(splits: dict[str, Checked]) -> None:
    """Raise a DataError where a split has no usable sample."""
    for split, check in splits.items():
        if len(check.indices) == 0:
            raise DataError(
                f"the {split} split has no usable sample; check data.root and data.{split}"
            )


def training_charset(source: Source) -> Charset:
    """The characters of all readable labels of a source."""
    found: set[str] = set()
    fault = ""
    for index in range(len(source)):
        try:
            found.update(source.label(index))
        except DataError as error:  # Where others can be read, check_split reports it.
            fault = fault or f"the first that cannot be read is {source.name(index)}: {error}"
    if not found:
        raise DataError(
            f"of {len(source)} training labels none has any character;"
            f" {fault or 'is the data set empty?'}"
        )
    return Charset("".join(sorted(found)))
