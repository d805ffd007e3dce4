import resource
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crnn.charset import Charset
from crnn.data import batches as batches_module
from crnn.data.batches import BUCKET, Lines, evaluation_batches, normalise, pad, training_batches
from crnn.data.sources import LabelFile
from crnn.errors import DataError, SettingsError
from crnn.settings import AugmentSettings, TrainSettings
from tests.conftest import CORES, on_cores

PLAIN = TrainSettings(epochs=1, batch_size=4)

on_one_core_too = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")
"""Two loaders are what is tested; where there is one core, PyTorch finds them too many."""


def test_an_epoch_has_every_line_once(lines: Lines) -> None:
    for batches in (training_batches(lines, PLAIN, 0, 0), evaluation_batches(lines, 4)):
        seen = [index for batch in batches for index in batch.indices]
        assert sorted(seen) == list(range(len(lines)))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 31, 32])
def test_an_epoch_in_windows_has_every_line_once_and_as_many_batches_as_it_says(
    lines: Lines, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "WINDOW", 8)
    monkeypatch.setattr(batches_module, "BLOCK", 2)
    few = replace(lines, indices=lines.indices[:count], widths=lines.widths[:count])
    orders = []
    for epoch in range(2):
        batches = training_batches(few, TrainSettings(epochs=1, batch_size=3), 0, epoch)
        seen = [batch.indices for batch in batches]
        assert len(seen) == len(batches)
        orders.append([index for indices in seen for index in indices])
        assert sorted(orders[-1]) == list(range(count))
    assert count < 8 or orders[0] != orders[1]


def test_the_memory_of_an_epoch_does_not_grow_with_its_lines(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "WINDOW", 1 << 14)

    def most_bytes(windows: int) -> int:
        count = windows << 14
        many = replace(lines, indices=np.broadcast_to(0, count), widths=np.broadcast_to(64, count))
        tracemalloc.start()
        read = sum(share.size for share in batches_module._Epoch(many, 32, 0, 0))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == count
        return most

    assert most_bytes(32) < 1.1 * most_bytes(2)


@on_one_core_too
def test_order_and_pixels_depend_on_seed_and_epoch_alone(lines: Lines) -> None:
    def epoch(seed: int, number: int, workers: int = 0) -> list[torch.Tensor]:
        batches = training_batches(replace(lines, workers=workers), PLAIN, seed, number)
        return [batch.images for batch in batches]

    first = epoch(0, 0)
    with on_cores(CORES):
        loaded = epoch(0, 0, workers=2)
    for same in (epoch(0, 0), loaded):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for other in (epoch(0, 1), epoch(1, 0)):
        assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, other, strict=False))


def test_evaluation_batches_hold_one_bucket_each(lines: Lines) -> None:
    for batch in evaluation_batches(lines, 4):
        buckets = {-(-int(width) // BUCKET) for width in batch.widths}
        assert len(buckets) == 1
        assert batch.images.shape[1:] == (3, 32, BUCKET * buckets.pop())


def test_lines_are_padded_on_the_right_with_what_becomes_zero() -> None:
    images = pad([np.full((32, 5, 3), 255, np.uint8), np.zeros((32, 18, 3), np.uint8)])
    assert images.shape == (2, 3, 32, 32)
    floats = normalise(images)
    assert floats[0, :, :, :5].unique().tolist() == [1.0]
    assert floats[0, :, :, 5:].abs().max() < 0.005
    assert floats[1, :, :, :18].unique().tolist() == [-1.0]


def test_targets_are_the_labels_one_after_another(lines: Lines) -> None:
    batch = next(iter(evaluation_batches(lines, 4)))
    assert batch.target_lengths.tolist() == [len(label) for label in batch.labels]
    assert batch.targets.tolist() == [c for lab in batch.labels for c in lines.charset.encode(lab)]
    assert [lines.source.label(i) for i in batch.indices] == batch.labels


def test_a_label_that_changed_since_it_was_checked_is_one_sentence(lines: Lines) -> None:
    digits = replace(lines, charset=Charset("012345678"))
    with pytest.raises(DataError, match=r"rendered 0/\d+, which could be .* not in the charset"):
        list(evaluation_batches(digits))


@on_one_core_too
def test_loaders_share_what_the_first_look_at_a_label_file_found(
    label_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LabelFile(label_folder / "train.txt", label_folder)
    count = len(LabelFile(label_folder / "train.txt", label_folder))
    whole = np.arange(count)
    lines = Lines(source, whole, np.full(count, 64, np.int32), Charset("0123456789"), 64, workers=2)
    with on_cores(CORES):
        batches = evaluation_batches(lines, 4)
        # What a worker would look for in the file now, it would not find.
        monkeypatch.setattr(LabelFile, "_from_its_start", None)
        assert sum(batch.size for batch in batches) == count


def test_a_sample_of_lines_is_spread_over_them(lines: Lines) -> None:
    assert lines.sample(4).indices.tolist() == [0, 13, 26, 39]
    assert len(set(lines.sample(30).indices)) == 30
    assert len(lines.sample(1000)) == len(lines)


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_augmentation_probabilities_are_shares(probability: float) -> None:
    with pytest.raises(ValueError, match="jpeg"):
        AugmentSettings(jpeg=probability)


@on_one_core_too
def test_a_loader_without_shared_memory_is_one_sentence_and_no_endless_wait(lines: Lines) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with on_cores(CORES):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
        try:
            with pytest.raises(SettingsError, match=r"no shared memory .*loader_workers: 0"):
                list(evaluation_batches(replace(lines, workers=1)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
