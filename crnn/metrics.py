"""Accuracy of read texts, and how sure it is."""

import math
from collections import Counter
from collections.abc import Sequence, Set
from itertools import chain
from statistics import mean, stdev

from rapidfuzz.distance import Levenshtein
from scipy.special import stdtrit

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


def paired_difference(
    wrong: Sequence[Set[int]], other_wrong: Sequence[Set[int]], lines: float
) -> Estimate:
    """The difference of two word accuracies on the same lines, with its 95% interval.

    What is hard for one network is mostly hard for another, so that only the lines on which they
    differ are uncertain. Half a line is added to each of the four cells (Agresti and Min 2005,
    Statistics in Medicine 24, 729-740). Of several seeds a line counts with the mean of its
    differences, and the spread of the seeds is added as in interval_of_seeds.

    Args:
        wrong: What the one reads wrongly, with each seed.
        other_wrong: What the other does, with the same seeds.
        lines: Number of val lines.

    Returns:
        One minus other, in [-1, 1].
    """
    gained = Counter(chain.from_iterable(other_wrong))
    gained.subtract(chain.from_iterable(wrong))
    gains = [gain / len(wrong) for gain in gained.values()]
    centre = sum(gains) / (lines + 2)
    from_lines = ((sum(gain**2 for gain in gains) + 1) / (lines + 2) - centre**2) / (lines + 2)
    of_seeds = [(len(o) - len(w)) / lines for w, o in zip(wrong, other_wrong, strict=True)]
    variance, z = _with_seeds(from_lines, of_seeds)
    spread = z * math.sqrt(variance)
    return mean(of_seeds), max(-1.0, centre - spread), min(1.0, centre + spread)


def interval_of_seeds(accuracies: list[float], lines: float) -> tuple[float, float]:
    """95% interval of the mean accuracy over seeds, for other lines and other seeds.

    All seeds read the same lines, so more seeds are not more lines: the variance of the mean is
    p (1 - p) / lines, from the lines, plus std^2 / seeds, from the seeds. It is the score interval
    (Wilson 1927) of the number of lines that alone would give this variance, the effective sample
    size (Kish 1965, Survey Sampling, section 8.2). As a few seeds tell std but roughly, the normal
    quantile is Student's t of as many degrees of freedom as the sum has (Welch 1947; Satterthwaite
    1946): that of the lines is taken as known.

    Args:
        accuracies: Of each seed, at least two.
        lines: Number of val lines.
    """
    share = mean(accuracies)
    from_lines = share * (1 - share) / lines
    variance, z = _with_seeds(from_lines, accuracies)
    return wilson_interval(share, lines * (from_lines / variance) if variance else lines, z)


def _with_seeds(from_lines: float, of_seeds: Sequence[float]) -> tuple[float, float]:
    """Variance of a mean over seeds, and the quantile of its 95% interval."""
    from_seeds = stdev(of_seeds) ** 2 / len(of_seeds) if len(of_seeds) > 1 else 0.0
    variance = from_lines + from_seeds
    if not from_seeds:
        return variance, Z_95
    degrees = (len(of_seeds) - 1) * (variance / from_seeds) ** 2
    return variance, float(stdtrit(degrees, 0.975))
