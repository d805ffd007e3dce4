"""Batches of lines of like width, in an order that is a function of (seed, epoch)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crnn.charset import Charset
from crnn.data.augment import augment
from crnn.data.images import BUCKET, fit_line, pad_lines
from crnn.data.render import generator
from crnn.data.sources import Source
from crnn.errors import DataError
from crnn.settings import AugmentSettings, TrainSettings

Sample = tuple[np.ndarray, str, int]
"""Pixels (32, w, 3), label, number in the source."""


@dataclass(frozen=True)
class Batch:
    """Lines of one padded width.

    Attributes:
        images: (N, 3, 32, W), uint8.
        widths: (N,), int64, each line's own width in pixels.
        targets: Class numbers of all labels one after another, int64.
        target_lengths: (N,), int64.
        labels: The texts.
        names: What a person calls the samples.
        indices: Numbers of the samples in their source.
    """

    images: Tensor
    widths: Tensor
    targets: Tensor
    target_lengths: Tensor
    labels: list[str]
    names: list[str]
    indices: list[int]


@dataclass(frozen=True)
class Lines:
    """The usable samples of a source, as training or evaluation reads them.

    Attributes:
        source: Where they come from.
        indices: (S,) numbers of the usable samples in the source.
        widths: (S,) their widths after scaling to 32 px high.
        charset: Classes of the labels.
        max_width: Widest line in pixels; wider ones are squeezed.
        workers: Loader processes; they change the speed alone.
    """

    source: Source
    indices: np.ndarray
    widths: np.ndarray
    charset: Charset
    max_width: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, count: int) -> "Lines":
        """At most `count` of the lines, evenly spaced."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)
        return replace(self, indices=self.indices[chosen], widths=self.widths[chosen])


def normalise(images: Tensor) -> Tensor:
    """Pixels uint8 in [0, 255] to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def pad(lines: Sequence[np.ndarray]) -> Tensor:
    """Lines (32, w_i, 3) to images (N, 3, 32, W), W the next multiple of 16, padded on the right.

    The width a line is padded to depends on batch mates of a wider bucket alone, and evaluation
    never mixes buckets, so a line reads the same in any batch.
    """
    return torch.from_numpy(pad_lines(lines)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _View(Dataset[Sample | DataError]):
    """Lines as one epoch sees them."""

    lines: Lines
    change: AugmentSettings | None
    key: tuple[int, int]

    def __getitem__(self, position: int) -> Sample | DataError:
        """The sample; or why it cannot be read, for the process that trains to raise."""
        index = int(self.lines.indices[position])
        try:
            return self._read(index)
        except DataError as error:
            name = self.lines.source.name(index)
            return DataError(f"sample {name}, which could be read before, cannot be now: {error}")

    def _read(self, index: int) -> Sample:
        lines = self.lines
        image = fit_line(lines.source.image(index), lines.max_width)
        if self.change is not None:
            image = augment(image, self.change, generator(*self.key, index))
        return np.asarray(image), lines.source.label(index), index

    def collate(self, samples: list[Sample | DataError]) -> Batch | DataError:
        read = [sample for sample in samples if not isinstance(sample, DataError)]
        if len(read) < len(samples):
            return next(sample for sample in samples if isinstance(sample, DataError))
        images, labels, indices = zip(*read, strict=True)
        classes = [self.lines.charset.encode(label) for label in labels]
        return Batch(
            images=pad(images),
            widths=torch.tensor([image.shape[1] for image in images]),
            targets=torch.tensor([c for label in classes for c in label]),
            target_lengths=torch.tensor([len(label) for label in classes]),
            labels=list(labels),
            names=[self.lines.source.name(index) for index in indices],
            indices=list(indices),
        )


class Batches:
    """Batches to iterate over once, loaded as they are asked for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def training_batches(lines: Lines, settings: TrainSettings, seed: int, epoch: int) -> Batches:
    """Every line once, shuffled and augmented as (seed, epoch) say."""
    view = _View(lines, settings.augment, (seed, epoch))
    return _loader(view, _shuffled(lines.widths, settings.batch_size, generator(seed, epoch)))


def evaluation_batches(lines: Lines, batch_size: int = 64) -> Batches:
    """Every line once, unchanged, in batches that never mix widths of two buckets."""
    order = np.argsort(lines.widths, kind="stable")
    buckets = np.split(order, np.flatnonzero(np.diff(_bucket(lines.widths[order]))) + 1)
    batches = [chunk for bucket in buckets for chunk in _chunks(bucket, batch_size)]
    return _loader(_View(lines, None, (0, 0)), batches)


def _bucket(widths: np.ndarray) -> np.ndarray:
    return -(-widths.astype(np.int64) // BUCKET)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _shuffled(widths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of one bucket each; what is left over in the buckets is joined by width."""
    order = rng.permutation(len(widths))
    buckets = _bucket(widths)[order]
    batches: list[np.ndarray] = []
    left_over: list[np.ndarray] = []
    for bucket in np.unique(buckets):
        members = order[buckets == bucket]
        full = len(members) // size * size
        batches += _chunks(members[:full], size)
        left_over.append(members[full:])
    batches += _chunks(np.concatenate(left_over), size)
    return [batches[i] for i in rng.permutation(len(batches))]


def _loader(view: _View, batches: list[np.ndarray]) -> Batches:
    workers = min(view.lines.workers, len(batches))
    loader = DataLoader(
        view,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=view.collate,
        prefetch_factor=4 if workers else None,
    )
    return Batches(loader)
