import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pruning.coupling import groups_of
from pruning.gammas import absolute_gammas, norms_of
from pruning.readiness import live_removed, readiness
from pruning.selection import keep_masks
from pruning.settings import PruneSettings, SparseSettings
from tests.conftest import random_recogniser

AUTO = SparseSettings(epochs=1)
PROXIMAL = SparseSettings(epochs=1, method="proximal", strength=1.0)


@hypothesis_settings(deadline=None)
@given(st.floats(0, 0.9))
def test_a_cut_is_free_up_to_the_free_ratio_and_no_further(share: float) -> None:
    model = random_recogniser(width=0.1)
    gammas = torch.cat([layer.weight.data for layer in norms_of(model).values()])
    threshold = gammas.abs().quantile(share)
    for layer in norms_of(model).values():
        values = layer.weight.data.abs()
        low = values < threshold
        low[values.argmax()] = False
        layer.weight.data[low] = 0
    free = readiness(model, AUTO, 0.8, 0.8).free_ratio
    gammas_now = absolute_gammas(model)
    assert live_removed(gammas_now, keep_masks(gammas_now, free, PruneSettings())) == 0
    beyond = keep_masks(gammas_now, round(free + 1e-4, 4), PruneSettings())
    assert live_removed(gammas_now, beyond) == 1


def test_the_sentence_says_what_limits_and_what_is_to_be_regained() -> None:
    model = random_recogniser(width=0.1)
    first = next(iter(norms_of(model).values()))
    first.weight.data[1:] = 0
    verdict = readiness(model, AUTO, 0.70, 0.85)
    total = sum(verdict.channels.values())
    assert f"{len(first.weight) - 1} of {total} channels are dead" in verdict.sentence
    assert "it reads 70.0%, the baseline 85.0%: there is no slack" in verdict.sentence
    assert "15.0 points to regain" in verdict.sentence
    assert "at their floor: cnn.1" in verdict.sentence
    assert "sparse.target_ratio 0.87 was not reached" in verdict.sentence
    for read in range(500, 1001):
        assert "there is slack" in readiness(model, AUTO, (read - 10) / 1000, read / 1000).sentence
    assert "train longer" in readiness(model, AUTO, 0.0, 0.0).sentence
    assert "it reads 40.0%, the baseline 0.0%" in readiness(model, AUTO, 0.4, 0.0).sentence


def test_a_branch_that_is_dead_as_a_whole_is_said_to_be() -> None:
    model = random_recogniser(width=1.0, backbone="mobilenetv3_small_100")
    group = next(group for group in groups_of(model) if group.branch)
    for name in group.norms:
        norms_of(model)[name].weight.data.zero_()
    settings = AUTO.model_copy(update={"drop_branches": True})
    verdict = readiness(model, settings, 0.8, 0.8)
    assert verdict.live[group.name] == 0
    assert f"branches that are dead as a whole: {group.branch}" in verdict.sentence
    assert verdict.at_floor == []
    kept = readiness(model, AUTO, 0.8, 0.8)
    assert kept.live[group.name] == 1
    assert kept.at_floor == [group.name]


def test_a_network_without_dead_channels_says_what_to_do() -> None:
    verdict = readiness(random_recogniser(width=0.1), PROXIMAL, 0.8, 0.8)
    assert verdict.sentence.startswith("every cut takes live channels: none of")
    assert verdict.sentence.endswith("raise sparse.strength or take sparse.method auto")


def test_what_a_penalty_leaves_of_a_channel_is_a_constant_and_not_called_free() -> None:
    model = random_recogniser(width=0.1)
    next(iter(norms_of(model).values())).weight.data[1:] = 0
    sentence = readiness(model, PROXIMAL, 0.8, 0.8).sentence
    assert "takes hardly more than constants" in sentence
    assert "free" not in sentence
