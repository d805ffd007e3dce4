"""The whole cut: what it costs never grows, and it is what its parts are."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, checkpoint_bytes
from crnn.data.batches import Lines, evaluation_batches, normalise
from crnn.errors import SettingsError
from crnn.networks.recogniser import Recogniser
from pruning.cost import macs, parameters
from pruning.gammas import absolute_gammas
from pruning.head import cut_head, frames_of, head_readers
from pruning.lstm import cut_units, keep_units, outputs_of
from pruning.selection import keep_masks
from pruning.settings import PruneSettings
from pruning.slimming import slim
from pruning.surgery import cut, mean_inputs
from tests.conftest import random_recogniser

UNCUT = random_recogniser(width=0.05).float()
shares = st.integers(0, 80).map(lambda percent: percent / 100)
ranks = st.none() | st.integers(1, 6)


def costs(ratio: float, lstm_ratio: float, head_rank: int | None, head_rows: int = 0) -> list[int]:
    settings = PruneSettings(lstm_ratio=lstm_ratio, head_rank=head_rank, head_rows=head_rows)
    model = slim(UNCUT, keep_masks(absolute_gammas(UNCUT), ratio, settings), settings)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return [*parameters(model).values(), macs(model), size]


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.tuples(shares, shares), st.tuples(shares, shares), st.tuples(ranks, ranks))
def test_no_cost_grows_with_a_ratio_or_as_the_rank_falls(
    ratios: tuple[float, float],
    lstm_ratios: tuple[float, float],
    head_ranks: tuple[int | None, int | None],
) -> None:
    low, high = sorted(head_ranks, key=lambda rank: rank or 99)
    try:
        deeper = costs(max(ratios), max(lstm_ratios), low)
        lighter = costs(min(ratios), min(lstm_ratios), high)
    except SettingsError as error:
        assert "prune.head_rank has to make the head smaller" in str(error)  # noqa: PT017
        return
    assert all(d <= c for d, c in zip(deeper, lighter, strict=True))


@hypothesis_settings(max_examples=20, deadline=None)
@given(shares, st.integers(1, 3), st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_no_cost_falls_with_the_rows(ratio: float, rank: int, rows: tuple[int, int]) -> None:
    fewer, more = (costs(ratio, 0, rank, count) for count in sorted(rows))
    assert all(f <= m for f, m in zip(fewer, more, strict=True))


def bits_of(model: Recogniser) -> bytes:
    return checkpoint_bytes(Checkpoint(model, Charset("0123456789"), 320, "prune"))


@pytest.mark.parametrize(("compensate", "rows"), [(True, 0), (True, 1), (False, 0)])
def test_channels_units_and_head_are_cut_in_this_order(
    lines: Lines, compensate: bool, rows: int
) -> None:
    settings = PruneSettings(
        lstm_ratio=0.5, head_rank=2, head_rows=rows, calibration_lines=10, compensate=compensate
    )
    batches = evaluation_batches(lines.sample(10))
    images = [normalise(batch.images) for batch in batches] if compensate else None
    masks = keep_masks(absolute_gammas(UNCUT), 0.4, settings)
    thin = cut(UNCUT, masks, images and mean_inputs(UNCUT, images))
    short = cut_units(thin, keep_units(thin, 0.5), outputs_of(thin, images) if images else None)
    found = slim(UNCUT, masks, settings, lines if compensate else None)
    frames = frames_of(short, images) if images else None
    assert bits_of(found) == bits_of(cut_head(short, 2, rows, frames))
    assert (found.rnn.hidden_size, parameters(found)["head"]) == (4, 2 * (8 + 11) + rows * 8 + 11)
    assert found.get_parameter(head_readers(found)[-1]).shape == (2, 8)


def test_without_the_settings_only_channels_go() -> None:
    masks = keep_masks(absolute_gammas(UNCUT), 0.4, PruneSettings())
    assert bits_of(slim(UNCUT, masks, PruneSettings())) == bits_of(cut(UNCUT, masks))
    assert isinstance(slim(UNCUT, masks, PruneSettings()).head, torch.nn.Linear)
