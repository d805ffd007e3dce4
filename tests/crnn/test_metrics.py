import math

import pytest
from scipy.stats import binomtest

from crnn.metrics import ned, wilson_interval, word_accuracy


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
