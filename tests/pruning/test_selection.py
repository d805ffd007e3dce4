from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from crnn.errors import SettingsError
from pruning.selection import keep_masks, largest_ratio
from pruning.settings import PruneSettings

LAYERS = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512)

# Few distinct values, so that ties abound.
gamma_layers = st.lists(
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12),
    min_size=1,
    max_size=5,
).map(lambda layers: [torch.tensor(layer) for layer in layers])
ratios = st.integers(0, 9999).map(lambda basis_points: basis_points / 10_000)
floors = st.builds(
    PruneSettings,
    min_channels=st.integers(1, 4),
    min_ratio=st.sampled_from([0.0, 0.12, 0.5]),
    round_to=st.sampled_from([1, 2, 8]),
) | st.builds(
    PruneSettings,
    min_channels=st.integers(1, 4),
    min_ratio=st.sampled_from([0.0, 0.12, 0.5]),
    selection=st.just("reference"),
)


def kept(masks: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


def brute_force_exact(gammas: list[Tensor], ratio: float) -> list[list[bool]]:
    """Sort (|gamma|, layer, channel) tuples and strike out the first floor(N x ratio)."""
    entries = sorted(
        (abs(float(g)), layer, channel)
        for layer, values in enumerate(gammas)
        for channel, g in enumerate(values)
    )
    gone = {entry[1:] for entry in entries[: len(entries) * Fraction(str(ratio)) // 1]}
    return [[(i, c) not in gone for c in range(len(g))] for i, g in enumerate(gammas)]


def test_reference_keeps_the_article_s_1118_of_2944_channels() -> None:
    gammas = list(torch.rand(sum(LAYERS)).split(LAYERS))
    assert kept(keep_masks(gammas, 0.62, PruneSettings(selection="reference"))) == 1118
    assert kept(keep_masks(gammas, 0.62, PruneSettings(selection="exact"))) == 1119


@given(gamma_layers, ratios)
def test_exact_removes_exactly_the_floor_of_n_times_ratio(
    gammas: list[Tensor], ratio: float
) -> None:
    total = sum(len(g) for g in gammas)
    wanted = total * Fraction(str(ratio)) // 1
    if wanted > total - len(gammas):
        with pytest.raises(SettingsError, match="largest ratio"):
            keep_masks(gammas, ratio, PruneSettings())
        return
    masks = keep_masks(gammas, ratio, PruneSettings())
    assert total - kept(masks) == wanted
    expected = brute_force_exact(gammas, ratio)
    if all(any(layer) for layer in expected):
        assert [mask.tolist() for mask in masks] == expected


@given(gamma_layers, ratios, ratios, floors)
def test_a_higher_ratio_keeps_a_subset(
    gammas: list[Tensor], one: float, other: float, settings: PruneSettings
) -> None:
    low, high = sorted((one, other))
    try:
        fewer = keep_masks(gammas, high, settings)
    except SettingsError:
        return
    more = keep_masks(gammas, low, settings)
    assert all((m | ~f).all() for m, f in zip(more, fewer, strict=True))


@given(gamma_layers, ratios, floors)
def test_every_layer_keeps_its_largest_up_to_the_floor(
    gammas: list[Tensor], ratio: float, settings: PruneSettings
) -> None:
    try:
        masks = keep_masks(gammas, ratio, settings)
    except SettingsError:
        return
    for gamma, mask in zip(gammas, masks, strict=True):
        channels = len(gamma)
        floor = max(settings.min_channels, -(-channels * Fraction(str(settings.min_ratio)) // 1))
        assert mask.sum() >= min(channels, floor)
        if not mask.all():
            assert mask.sum() % settings.round_to == 0
            assert gamma.abs()[mask].min() >= gamma.abs()[~mask].max()


@given(gamma_layers, st.integers(0, 31), ratios, ratios, floors)
def test_what_vanishes_keeps_its_floor_or_nothing(
    gammas: list[Tensor], chosen: int, one: float, other: float, settings: PruneSettings
) -> None:
    """Only what may, and of it the floor goes at once; a higher ratio still keeps a subset."""
    vanishing = [bool(chosen >> place & 1) for place in range(len(gammas))]
    gammas = [g * (not v) for g, v in zip(gammas, vanishing, strict=True)]
    low, high = sorted((one, other))
    try:
        fewer = keep_masks(gammas, high, settings, vanishing=vanishing)
    except SettingsError:
        assert high > largest_ratio(gammas, settings, vanishing)
        return
    more = keep_masks(gammas, low, settings, vanishing=vanishing)
    assert all((m | ~f).all() for m, f in zip(more, fewer, strict=True))
    for gamma, mask, may_vanish in zip(gammas, fewer, vanishing, strict=True):
        share = -(-len(gamma) * Fraction(str(settings.min_ratio)) // 1)
        floor = min(len(gamma), max(settings.min_channels, share))
        may_vanish = may_vanish and settings.selection == "exact"
        assert mask.sum() >= floor or (may_vanish and not mask.any())


def test_without_a_branch_a_higher_ratio_is_within_reach() -> None:
    gammas = [torch.tensor([0.9, 0.8]), torch.zeros(6)]
    settings = PruneSettings(min_channels=2)
    assert largest_ratio(gammas, settings) == 0.6249
    assert largest_ratio(gammas, settings, [False, True]) == 0.8749
    widths = [
        int(keep_masks(gammas, ratio, settings, vanishing=[False, True])[1].sum())
        for ratio in (0.5, 0.625, 0.75)
    ]
    assert widths == [2, 2, 0], "its two last channels go together"
    with pytest.raises(SettingsError, match=r"the largest ratio is 0\.8749"):
        keep_masks(gammas, 0.875, settings, vanishing=[False, True])


@given(gamma_layers, ratios, st.sampled_from([2, 4, 8]))
def test_rounded_widths_have_the_ratio_that_was_asked_for_unless_that_costs_live_channels(
    gammas: list[Tensor], ratio: float, round_to: int
) -> None:
    total = sum(len(g) for g in gammas)
    wanted = total * Fraction(str(ratio)) // 1
    try:
        masks = keep_masks(gammas, ratio, PruneSettings(round_to=round_to))
    except SettingsError:
        assert wanted > total - sum(min(len(g), round_to) for g in gammas)
        return
    assert total - kept(masks) <= wanted
    beyond_floor = [g.abs().sort(descending=True).values[round_to:] for g in gammas]
    dead = sum(int((g == 0).sum()) for g in beyond_floor)
    live_removed = sum(int((g[~mask] != 0).sum()) for g, mask in zip(gammas, masks, strict=True))
    if wanted > dead:
        assert wanted - round_to < total - kept(masks)
    else:
        assert live_removed == 0


def test_a_floor_under_dead_channels_does_not_stop_a_rounded_cut() -> None:
    gammas = [torch.tensor([0.9] * 2 + [0.0] * 14), torch.tensor([0.8] * 10 + [0.0] * 6)]
    settings = PruneSettings(round_to=8)
    ratio = largest_ratio(gammas, settings)
    assert ratio == 0.5312
    assert [int(mask.sum()) for mask in keep_masks(gammas, ratio, settings)] == [8, 8]


def test_rounding_cuts_what_is_worth_least_a_channel_and_the_dead_before_all() -> None:
    two_alive = [0.9] * 4 + [0.3, 0.2, 0.0, 0.0]
    one_alive = [0.8] * 4 + [0.4, 0.0, 0.0, 0.0]
    dead = [0.1] * 4 + [0.0] * 4
    gammas = [torch.tensor(layer) for layer in (two_alive, one_alive, dead)]
    widths = [
        [int(mask.sum()) for mask in keep_masks(gammas, ratio, PruneSettings(round_to=4))]
        for ratio in (0.17, 0.34, 0.42, 0.5)
    ]
    assert widths == [[8, 8, 4], [8, 8, 4], [8, 4, 4], [4, 4, 4]], "9 channels of 24 are dead"


def test_the_reference_rule_does_not_round() -> None:
    with pytest.raises(ValidationError, match="round_to 8 needs selection exact"):
        PruneSettings(selection="reference", round_to=8)


def test_what_a_floor_saves_is_taken_elsewhere() -> None:
    gammas = [torch.full((10,), 0.01), torch.linspace(0.5, 1, 30)]
    masks = keep_masks(gammas, 0.5, PruneSettings(min_ratio=0.3))
    assert [int(mask.sum()) for mask in masks] == [3, 17]


@pytest.mark.parametrize("selection", ["exact", "reference"])
def test_the_error_names_the_largest_ratio_and_that_ratio_works(selection: str) -> None:
    gammas = [torch.rand(8), torch.rand(16)]
    settings = PruneSettings.model_validate({"min_channels": 4, "selection": selection})
    with pytest.raises(SettingsError, match=r"largest ratio is 0\.7083"):
        keep_masks(gammas, 0.75, settings)
    assert kept(keep_masks(gammas, 0.7083, settings)) >= 8


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_outside_the_interval_are_refused(ratio: float) -> None:
    with pytest.raises(SettingsError, match=r"\[0, 1\)"):
        keep_masks([torch.rand(4)], ratio, PruneSettings())


@given(gamma_layers, ratios, st.randoms())
def test_of_the_dead_those_go_first_that_died_first(
    gammas: list[Tensor], ratio: float, chance: Random
) -> None:
    sizes = [len(g) for g in gammas]
    flat = torch.cat(gammas)
    order = list(range(1, int((flat == 0).sum()) + 1))
    chance.shuffle(order)
    deaths = torch.zeros(len(flat), dtype=torch.long)
    deaths[flat == 0] = torch.tensor(order, dtype=torch.long)
    ranks = {int(i): (abs(float(flat[i])), int(deaths[i]), int(i)) for i in range(len(flat))}
    count = len(flat) * Fraction(str(ratio)) // 1
    gone = set(sorted(ranks, key=lambda i: ranks[i])[:count])
    settings = PruneSettings(min_channels=1)
    if count > len(flat) - len(gammas):
        return
    masks = torch.cat(keep_masks(gammas, ratio, settings, torch.split(deaths, sizes)))
    survivors = torch.split(torch.tensor([i not in gone for i in range(len(flat))]), sizes)
    if all(part.any() for part in survivors):  # Otherwise a floor decides.
        assert masks.tolist() == torch.cat(survivors).tolist()
