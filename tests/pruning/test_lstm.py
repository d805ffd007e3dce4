"""The LSTM with fewer hidden units against the one whose removed units are silent, in float64."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn

from crnn.networks.recogniser import Recogniser
from pruning.lstm import cut_units, keep_units, magnitudes, outputs_of
from tests.conftest import HEADS, give_head, random_recogniser

CELLS = {(0, 0): "l0", (0, 1): "l0_reverse", (1, 0): "l1", (1, 1): "l1_reverse"}
IMAGES = torch.randn(2, 3, 32, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Head: TypeAlias = tuple[int | None, int]
all_heads = pytest.mark.parametrize("head", HEADS)


def strong_recogniser(head: Head = (None, 0)) -> Recogniser:
    """Hidden size 8, recurrent weights large enough that every unit matters to every other."""
    model = random_recogniser()
    give_head(model, *head)
    with torch.no_grad():
        for weight in model.rnn.parameters():
            weight.mul_(3)
    return model


def rows_of(model: Recogniser, cell: str, unit: int | Tensor) -> list[Tensor]:
    """Views of the four gates' rows of a unit: both weights, both biases; gates first."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [model.get_parameter(f"rnn.{part}_{cell}").data for part in parts]
    return [weight.view(4, 8, -1)[:, unit] for weight in weights]


def silence(model: Recogniser, masks: Tensor) -> None:
    """Zero all weights into the removed units: g = tanh(0) = 0, so that c and h stay exactly 0."""
    for (layer, direction), cell in CELLS.items():
        for unit in (~masks[layer, direction]).nonzero():
            for rows in rows_of(model, cell, int(unit)):
                rows.zero_()


def random_masks(kept: int, seed: int = 0) -> Tensor:
    """Other units in each layer and direction."""
    scores = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(2).argsort(2) < kept


@all_heads
@pytest.mark.parametrize("kept", [8, 7, 4, 1])
def test_cutting_silent_units_changes_nothing(kept: int, head: Head) -> None:
    model, masks = strong_recogniser(head), random_masks(kept)
    with torch.inference_mode():
        before = model(IMAGES)
        silence(model, masks)
        silent = model(IMAGES)
        compact = cut_units(model, masks)
        assert compact.rnn.hidden_size == kept
        assert (silent - compact(IMAGES)).abs().max() < 1e-9
    assert kept == 8 or (before - silent).abs().max() > 1e-2, "the units mattered"


@all_heads
def test_the_network_is_left_as_it_is(head: Head) -> None:
    model = strong_recogniser(head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut_units(model, random_masks(3), outputs_of(model, [IMAGES]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@all_heads
def test_a_magnitude_is_what_zeroing_the_group_takes_off_the_norm(head: Head) -> None:
    sizes = magnitudes(strong_recogniser(head))
    for (layer, direction), cell in CELLS.items():
        for unit in range(8):
            model = strong_recogniser(head)
            before = square_of(model)
            for rows in rows_of(model, cell, unit):
                rows.zero_()
            model.get_parameter(f"rnn.weight_hh_{cell}").data[:, unit] = 0
            next_layer = [model.rnn.weight_ih_l1, model.rnn.weight_ih_l1_reverse]
            in_head = [p for p in model.head.parameters() if p.shape[1:] == (16,)]
            for reader in in_head if layer == 1 else next_layer:
                reader.data[:, 8 * direction + unit] = 0
            expected = (before - square_of(model)) ** 0.5
            assert float(sizes[layer, direction, unit]) == pytest.approx(expected, rel=1e-9)


def square_of(model: Recogniser) -> float:
    parts = [*model.rnn.parameters(), *model.head.parameters()]
    return sum(float(p.detach().square().sum()) for p in parts)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.125, 0.3, 0.5, 0.62, 0.875, 0.9999])
def test_the_smallest_units_go_as_many_in_each_layer_and_direction(ratio: float) -> None:
    model = strong_recogniser()
    keep, sizes = keep_units(model, ratio), magnitudes(model)
    assert ((~keep).sum(2) == 8 * Fraction(str(ratio)) // 1).all()
    assert keep.any(2).all()
    largest_gone = sizes.masked_fill(keep, 0).amax(2)
    smallest_kept = sizes.masked_fill(~keep, torch.inf).amin(2)
    assert (largest_gone <= smallest_kept).all()


def test_a_higher_ratio_keeps_a_subset_even_among_equals() -> None:
    model = strong_recogniser()
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    kept = [keep_units(model, ratio) for ratio in (0.2, 0.4, 0.6, 0.8)]
    assert all((more | ~fewer).all() for more, fewer in pairwise(kept))


def test_outputs_agree_with_single_cells_run_by_hand() -> None:
    model = strong_recogniser()
    found = outputs_of(model, [IMAGES[:1], IMAGES[1:]])
    with torch.inference_mode():
        frames = model.features(IMAGES)
        for layer in range(2):
            outputs = [run_by_hand(model, frames, CELLS[layer, d]) for d in range(2)]
            frames = torch.cat(outputs, 2)
            assert torch.allclose(found[layer].mean, frames.mean((0, 1)), atol=1e-12)
            spread = torch.cov(frames.flatten(0, 1).T, correction=0)
            assert torch.allclose(found[layer].covariance, spread, atol=1e-12)
        assert torch.allclose(frames, model.rnn(model.features(IMAGES))[0], atol=1e-12)


def run_by_hand(model: Recogniser, frames: Tensor, cell: str) -> Tensor:
    """One layer and direction, frame by frame: (T, N, C) to (T, N, 8)."""
    by_hand = nn.LSTMCell(frames.shape[2], 8).double()
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    by_hand.load_state_dict({p: model.get_parameter(f"rnn.{p}_{cell}") for p in parts})
    order = range(len(frames))
    outputs, state = [], None
    for t in reversed(order) if cell.endswith("reverse") else order:
        state = by_hand(frames[t], state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if cell.endswith("reverse") else outputs)


def hold_constant(model: Recogniser, masks: Tensor) -> Tensor:
    """Make the removed units say a constant from the first frame on; return it, (2, 2, 8)."""
    silence(model, masks)
    constants = torch.zeros(2, 2, 8, dtype=torch.float64)
    for (layer, direction), cell in CELLS.items():
        gone = ~masks[layer, direction]
        candidate = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
        _, _, bias, _ = rows_of(model, cell, slice(None))
        bias[0, gone], bias[1, gone], bias[3, gone] = 1e3, -1e3, 1e3  # Open, forget all, open.
        bias[2, gone] = candidate[gone, None]
        constants[layer, direction, gone] = candidate[gone].tanh().tanh()
    return constants


@all_heads
def test_compensation_is_exact_for_constant_units(head: Head) -> None:
    """Against the uncut LSTM that remembers the constants already before the first frame."""
    model, masks = strong_recogniser(head), random_masks(5)
    constants = hold_constant(model, masks)
    said = outputs_of(model, [IMAGES])
    means = torch.stack([layer.mean for layer in said]).view(2, 2, 8)
    assert torch.allclose(means[~masks], constants[~masks], atol=1e-12)
    remembered = constants.view(4, 1, 8).expand(4, 2, 8).contiguous()
    with torch.inference_mode():
        outputs, _ = model.rnn(model.features(IMAGES), (remembered, torch.zeros_like(remembered)))
        truth = model.head(outputs)
        assert (cut_units(model, masks, said)(IMAGES) - truth).abs().max() < 1e-9
        assert (cut_units(model, masks)(IMAGES) - truth).abs().max() > 1e-2


@all_heads
def test_units_that_say_what_others_say_are_not_missed(head: Head) -> None:
    """Unit 7 of every layer and direction is unit 0 again, whatever reads it: both begin at 0."""
    model = strong_recogniser(head)
    for cell in CELLS.values():
        for rows in rows_of(model, cell, slice(None)):
            rows[:, 7] = rows[:, 0]
    masks = torch.arange(8).expand(2, 2, 8) < 7
    said = outputs_of(model, [IMAGES])
    with torch.inference_mode():
        truth = model(IMAGES)
        told = (cut_units(model, masks, said)(IMAGES) - truth).abs().max()
        dropped = (cut_units(model, masks)(IMAGES) - truth).abs().max()
    assert told < dropped / 100


def test_compensation_stays_nearer_to_the_uncut_network_than_means_and_than_dropping() -> None:
    model = random_recogniser()
    masks = keep_units(model, 0.25)
    said = outputs_of(model, [IMAGES])
    means = [replace(layer, covariance=torch.zeros_like(layer.covariance)) for layer in said]
    with torch.inference_mode():
        truth = model(IMAGES)
        told, meant, dropped = (
            float((cut_units(model, masks, outputs)(IMAGES) - truth).square().mean())
            for outputs in (said, means, None)
        )
    assert told < meant < dropped
