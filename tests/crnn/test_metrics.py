import math

import numpy as np
import pytest
from scipy.stats import binomtest

from crnn.metrics import (
    difference_interval,
    ned,
    paired_difference,
    wilson_interval,
    word_accuracy,
)


@pytest.mark.parametrize(
    ("texts", "labels", "accuracy", "similarity"),
    [
        (["ab"], ["ab"], 1.0, 1.0),
        (["ab", "x"], ["ab", "y"], 0.5, 0.5),
        (["abcd"], ["abxd"], 0.0, 0.75),
        ([""], ["ab"], 0.0, 0.0),
        (["ab"], [""], 0.0, 0.0),
        ([""], [""], 1.0, 1.0),
        (["kitten"], ["sitting"], 0.0, 1 - 3 / 7),
    ],
)
def test_known_values(
    texts: list[str], labels: list[str], accuracy: float, similarity: float
) -> None:
    assert word_accuracy(texts, labels) == accuracy
    assert ned(texts, labels) == pytest.approx(similarity)


def test_no_lines_have_no_accuracy() -> None:
    assert math.isnan(word_accuracy([], []))
    assert math.isnan(ned([], []))
    assert wilson_interval(math.nan, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 3), (830, 1000), (3, 850)])
def test_interval_agrees_with_scipy(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(right / count, count)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert low <= right / count <= high


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_interval_of_a_difference_as_newcombe_published_it(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    """Table II of Newcombe 1998, examples a to d, method 10."""
    estimates = [(r / n, *wilson_interval(r / n, n)) for r, n in (one, other)]
    difference, lower, upper = difference_interval(*estimates)
    assert difference == pytest.approx(one[0] / one[1] - other[0] / other[1])
    assert (lower, upper) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert difference_interval(*reversed(estimates))[1] == pytest.approx(-upper)


def lines_where(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


def test_of_two_networks_that_read_the_same_lines_only_those_count_on_which_they_differ() -> None:
    """The Wald interval with half a line more in each cell, written out for 1,000 lines."""
    wrong, other_wrong = set(range(100)), set(range(30, 150))  # 30 and 50 of their own.
    difference, low, high = paired_difference([wrong], [other_wrong], 1000)
    assert difference == pytest.approx(0.02)
    only, other_only, lines = 30.5, 50.5, 1002
    centre = (other_only - only) / lines
    spread = 1.959964 * math.sqrt(only + other_only - (other_only - only) ** 2 / lines) / lines
    assert (low, high) == pytest.approx((centre - spread, centre + spread))
    unpaired = difference_interval(
        (0.9, *wilson_interval(0.9, 1000)), (0.88, *wilson_interval(0.88, 1000))
    )
    assert high - low < 0.7 * (unpaired[2] - unpaired[1])
    assert paired_difference([other_wrong], [wrong], 1000) == pytest.approx(
        (-difference, -high, -low)
    )
    level, low, high = paired_difference([wrong], [wrong], 1000)
    assert level == 0
    assert 0 < high == -low < 0.003
    assert paired_difference([set(), set()], [{0, 1}, {0, 1}], 2)[::2] == (1, 1)


def test_the_paired_interval_has_the_difference_in_nineteen_of_twenty_samples() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        draw = random.random(300)  # Both wrong: 5%; the one alone: 2%; the other alone: 6%.
        wrong, other_wrong = lines_where(draw < 0.07), lines_where((draw < 0.05) | (draw > 0.94))
        _, low, high = paired_difference([wrong], [other_wrong], 300)
        held += low <= 0.04 <= high
    assert 0.94 <= held / 2000 <= 0.97


def test_the_spread_of_seeds_widens_the_paired_interval() -> None:
    wrong, other = set(range(60)), set(range(100))
    alike = paired_difference([wrong, wrong], [other, other], 1000)
    assert alike == pytest.approx(paired_difference([wrong], [other], 1000))
    apart = paired_difference([set(range(40)), set(range(80))], [other, other], 1000)
    assert apart[0] == pytest.approx(alike[0])
    assert apart[2] - apart[1] > 2 * (alike[2] - alike[1])
