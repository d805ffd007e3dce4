import math

import pytest
from scipy.stats import binomtest

from crnn.metrics import difference_interval, ned, wilson_interval, word_accuracy


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
