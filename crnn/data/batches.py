"""Batches of lines of like width, in an order that is a function of (seed, epoch).

An epoch is drawn window by window, so that its memory does not grow with the lines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from crnn.charset import Charset
from crnn.data.augment import augment
from crnn.data.images import BUCKET, fit_line, pad_lines
from crnn.data.render import generator
from crnn.data.sources import LabelFile, Source
from crnn.distributed import own_share
from crnn.errors import DataError, SettingsError, UserError
from crnn.settings import AugmentSettings, TrainSettings

Sample = tuple[np.ndarray, str, int]
"""Pixels (32, w, 3), label, number in the source."""

WINDOW = 1 << 20
"""Lines that are shuffled and sorted by width at once."""

BLOCK = 1 << 10
"""Neighbours that come into the same window, where there are more lines than one holds."""


class Share(NamedTuple):
    """What a process reads of a batch.

    Attributes:
        positions: Of its lines among all usable ones.
        width: Of the batch's widest line, px.
        size: Lines of the batch in all processes.
    """

    positions: np.ndarray
    width: int
    size: int


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
        size: Lines of the batch in all processes, N where there is one.
    """

    images: Tensor
    widths: Tensor
    targets: Tensor
    target_lengths: Tensor
    labels: list[str]
    names: list[str]
    indices: list[int]
    size: int


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


def pad(lines: Sequence[np.ndarray], width: int = 0) -> Tensor:
    """Lines (32, w_i, 3) to images (N, 3, 32, W), W the next multiple of 16, padded on the right.

    W is that of a line of `width` px where all lines are narrower.

    The width a line is padded to depends on batch mates of a wider bucket alone, and evaluation
    never mixes buckets, so a line reads the same in any batch.
    """
    return torch.from_numpy(pad_lines(lines, width)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _View(Dataset[Batch | UserError]):
    """Lines as one epoch sees them, a batch at a time."""

    lines: Lines
    change: AugmentSettings | None
    key: tuple[int, int]

    def __getitem__(self, share: Share) -> Batch | UserError:
        """The lines; or why they cannot be read, for the process that trains to raise."""
        try:
            samples = [self._read(int(self.lines.indices[p])) for p in share.positions]
        except DataError as error:
            return error
        batch = self._collated(samples, share)
        if get_worker_info():
            try:
                batch.images.share_memory_()  # type: ignore[no-untyped-call]
            except RuntimeError as error:  # In the thread that sends the batch it would go unheard.
                return SettingsError(
                    f"a loader process gets no shared memory ({error}); set"
                    " execution.loader_workers: 0, or give it more (docker's --shm-size)"
                )
        return batch

    def _read(self, index: int) -> Sample:
        lines = self.lines
        try:
            image = fit_line(lines.source.image(index), lines.max_width)
            label = lines.source.label(index)
            if unknown := lines.charset.unknown(label):
                raise DataError(f"{unknown!r} in {label!r} is not in the charset")
        except DataError as error:
            name = lines.source.name(index)
            raise DataError(
                f"sample {name}, which could be read before, cannot be now: {error}"
            ) from error
        if self.change is not None:
            image = augment(image, self.change, generator(*self.key, index))
        return np.asarray(image), label, index

    def _collated(self, samples: list[Sample], share: Share) -> Batch:
        images, labels, indices = zip(*samples, strict=True)
        classes = [self.lines.charset.encode(label) for label in labels]
        return Batch(
            images=pad(images, share.width),
            widths=torch.tensor([image.shape[1] for image in images]),
            targets=torch.tensor([c for label in classes for c in label]),
            target_lengths=torch.tensor([len(label) for label in classes]),
            labels=list(labels),
            names=[self.lines.source.name(index) for index in indices],
            indices=list(indices),
            size=share.size,
        )


class Batches:
    """Batches to iterate over once, loaded as they are asked for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def training_batches(lines: Lines, settings: TrainSettings, seed: int, epoch: int) -> Batches:
    """Every line once, shuffled and augmented as (seed, epoch) say; this process's share of it."""
    return _loader(
        _View(lines, settings.augment, (seed, epoch)),
        _Epoch(lines, settings.batch_size, seed, epoch),
    )


@dataclass(frozen=True)
class _Epoch:
    """This process's shares of the batches of an epoch, made as they are asked for."""

    lines: Lines
    size: int
    seed: int
    epoch: int

    def __len__(self) -> int:
        """A window's batches are full but for one, whatever the widths of its lines are."""
        count = len(self.lines)
        windows = (min(WINDOW, count - start) for start in range(0, count, WINDOW))
        return sum(-(-window // self.size) for window in windows)

    def __iter__(self) -> Iterator[Share]:
        rng = generator(self.seed, self.epoch)
        for window in _windows(len(self.lines), rng):
            for batch in _by_width(window, self.lines.widths[window], self.size, rng):
                own = batch[own_share(len(batch))]
                yield Share(own, _widest(self.lines, batch), len(batch))


def _windows(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All lines in random order, a window at a time; a window of some is made of random blocks."""
    if count <= WINDOW:
        yield rng.permutation(count)
        return
    last = (count - 1) // BLOCK  # May be short, and stays the last: all windows but one are full.
    blocks = np.append(rng.permutation(last), last)
    for chosen in _chunks(blocks, WINDOW // BLOCK):
        members = (chosen[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        yield rng.permutation(members[members < count])


def evaluation_batches(lines: Lines, batch_size: int = 64, part: slice = slice(None)) -> Batches:
    """Every line once, unchanged, in batches that never mix widths of two buckets.

    Args:
        lines: What to read.
        batch_size: Lines at once.
        part: Which of the batches.
    """
    order = np.argsort(lines.widths, kind="stable")
    buckets = np.split(order, np.flatnonzero(np.diff(_bucket(lines.widths[order]))) + 1)
    batches = [chunk for bucket in buckets for chunk in _chunks(bucket, batch_size)]
    whole = [Share(batch, _widest(lines, batch), len(batch)) for batch in batches[part]]
    return _loader(_View(lines, None, (0, 0)), whole)


def _widest(lines: Lines, batch: np.ndarray) -> int:
    return int(lines.widths[batch].max())


def _bucket(widths: np.ndarray) -> np.ndarray:
    return -(-widths.astype(np.int64) // BUCKET)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _by_width(
    order: np.ndarray, widths: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of one bucket each; what is left over in the buckets is joined by width."""
    buckets = _bucket(widths)
    batches: list[np.ndarray] = []
    left_over: list[np.ndarray] = []
    for bucket in np.unique(buckets):
        members = order[buckets == bucket]
        full = len(members) // size * size
        batches += _chunks(members[:full], size)
        left_over.append(members[full:])
    batches += _chunks(np.concatenate(left_over), size)
    return (batches[i] for i in rng.permutation(len(batches)))


def _loader(view: _View, shares: Sequence[Share] | _Epoch) -> Batches:
    workers = min(view.lines.workers, len(shares))
    if workers and isinstance(view.lines.source, LabelFile):
        len(view.lines.source)  # Before the fork it is done once; an LMDB is opened after it.
    loader = DataLoader(
        view,
        batch_size=None,  # An item is a batch already.
        sampler=shares,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return Batches(loader)
