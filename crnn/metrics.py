"""Accuracy of read texts."""

import math
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

Z_95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""


Estimate = tuple[float, float, float]
"""A figure and the two ends of its 95% interval."""


def word_accuracy(texts: Sequence[str], labels: Sequence[str]) -> float:
    """Share of lines read without any error, in [0, 1]; nan of no lines."""
    if not labels:
        return math.nan
    return sum(t == label for t, label in zip(texts, labels, strict=True)) / len(labels)


def ned(texts: Sequence[str], labels: Sequence[str]) -> float:
    """Mean of 1 - edit distance / length of the longer text, in [0, 1]; nan of no lines.

    The normalised edit distance of ICDAR 2019 (arXiv:1909.07741); 1 is perfect. Two empty texts
    count 1.
    """
    if not labels:
        return math.nan
    pairs = zip(texts, labels, strict=True)
    return sum(Levenshtein.normalized_similarity(t, label) for t, label in pairs) / len(labels)


def wilson_interval(share: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share seen in `count` trials (Wilson 1927); (0, 1) of no trials.

    z is the quantile: that of 95% unless told otherwise.
    """
    if count == 0:
        return 0.0, 1.0
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # At shares of 0 and 1 one bound is the share itself; rounding must not push it past.
    return max(0.0, min(share, (centre - spread) / scale)), min(
        1.0, max(share, (centre + spread) / scale)
    )


def difference_interval(one: Estimate, other: Estimate) -> Estimate:
    """The difference of two independent shares, one minus other, with its 95% interval.

    Square-and-add of the two intervals, method 10 of Newcombe 1998 (Statistics in Medicine 17,
    873-890). Deviation: the two may be other than Wilson's (Zou and Donner 2008, Statistics in
    Medicine 27, 1693-1702, show that any good ones serve).
    """
    (share, low, high), (other_share, other_low, other_high) = one, other
    difference = share - other_share
    below = math.hypot(share - low, other_high - other_share)
    above = math.hypot(high - share, other_share - other_low)
    return difference, difference - below, difference + above
