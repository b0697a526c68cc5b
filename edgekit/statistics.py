"""What a sample can say: intervals, the paired test, and the power of a sample size.

The paired difference is always second minus first, over n samples that both have answered: `only_first` counts those
that only the first got right, `only_second` those that only the second did. The student is first, its file second.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

from edgekit.errors import EdgekitError

CONFIDENCE = 0.95
CHANGE_SIDES = 0.02  # the share of samples that an honest int8 file was seen to move: the case that power is told for
LIKELY = 0.9


def _z(confidence: float) -> float:
    """The two-sided normal quantile of `confidence`."""
    if not 0 < confidence < 1:
        raise EdgekitError(f"a confidence lies between 0 and 1, not at {confidence:g}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _counted(n: int, *counts: int) -> None:
    if n < 1 or min(counts) < 0 or sum(counts) > n:
        raise EdgekitError(f"{' + '.join(map(str, counts))} of {n} samples is no count")


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a proportion: Wilson, JASA 1927.

    Returns:
        low, high: fractions in [0, 1]; exactly 0 or 1 where no or every sample succeeded.
    Raises:
        EdgekitError: the counts are impossible.
    """
    _counted(n, successes)
    z, share = _z(confidence), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula is 0 or 1 up to rounding, and rounding must not report -1e-18.
    return max(0.0, middle - half) if successes else 0.0, min(1.0, middle + half) if successes < n else 1.0


def _spread(only_first: Any, only_second: Any, n: int, difference: float) -> Any:
    """n times the variance of (only_second - only_first) / n ** 0.5 were the true difference `difference`.

    The nuisance parameter, the share q of samples that only the first gets right, takes the value of highest
    likelihood under that constraint: the larger root of 2n q^2 - B q - only_first * d * (1 - d) = 0.

    Args:
        only_first, only_second: counts, numbers or arrays that broadcast.
        difference: in [-1, 1].
    """
    if difference < 0:  # the mirrored problem: for d >= 0 the two roots have opposite signs and nothing cancels
        return _spread(only_second, only_first, n, -difference)
    d = difference
    b = only_first + only_second - d * (2 * n + only_first - only_second)
    root = (b * b + 8 * n * only_first * d * (1 - d)) ** 0.5
    # b + root, without the cancellation of a negative b: (root^2 - b^2) / (root - b).
    positive = (b > 0) * 1.0
    gap = root + abs(b)
    q = (positive * gap + (1 - positive) * 8 * n * only_first * d * (1 - d) / (gap + (gap == 0))) / (4 * n)
    return n * (2 * q + d * (1 - d))


def tango(only_first: int, only_second: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a paired difference of proportions: Tango, Statistics in Medicine 17 (1998) 891-908.

    Returns:
        low, high: around (only_second - only_first) / n, in [-1, 1].
    Raises:
        EdgekitError: the counts are impossible.
    """
    _counted(n, only_first, only_second)
    high = -_lower(only_second, only_first, n, confidence)
    return _lower(only_first, only_second, n, confidence), high + 0.0  # + 0.0: never -0.0


def _lower(only_first: int, only_second: int, n: int, confidence: float) -> float:
    """Where (estimate - d) / standard error(d) equals z: the smallest difference that the counts do not reject."""
    z = _z(confidence)

    def beyond(d: float) -> float:
        return only_second - only_first - n * d - z * math.sqrt(_spread(only_first, only_second, n, d))

    # Positive above -1, negative below the estimate; halve until no float64 lies between. The ends themselves, where
    # the standard error can be 0, are never asked.
    low, high = -1.0, (only_second - only_first) / n
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if beyond(middle) > 0 else (low, middle)
    return low


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: are the samples that changed sides a fair coin's tosses?"""
    from scipy.special import bdtr

    changed = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), changed, 0.5)))


def power(n: int, discordant: float, tolerance: float, change: float = 0.0, confidence: float = CONFIDENCE) -> float:
    """The probability that Tango's low end reaches -tolerance: that a file is said to have survived.

    Args:
        n: samples.
        discordant: the expected share of samples that change sides, in either direction.
        tolerance: the loss allowed, a fraction.
        change: the true change, a fraction with |change| <= discordant; negative is a loss.
    Raises:
        EdgekitError: such shares cannot be.
    """
    z = _z(confidence)
    if tolerance >= 1:  # no interval reaches below -1
        return 1.0

    def reached(first: Any, second: Any) -> Any:
        surplus = second - first + n * tolerance
        return (surplus > 0) & (surplus >= z * _spread(first, second, n, -tolerance) ** 0.5)

    return _chance(n, discordant, change, reached)


def power_to_lose(n: int, discordant: float, tolerance: float, change: float, confidence: float = CONFIDENCE) -> float:
    """The probability that Tango's high end stays below -tolerance: that a file is said to have lost. As `power`."""
    z = _z(confidence)
    if tolerance >= 1:
        return 0.0

    def not_below(first: Any, second: Any) -> Any:
        return second - first + n * tolerance >= -z * _spread(first, second, n, -tolerance) ** 0.5

    return 1 - _chance(n, discordant, change, not_below)


def _chance(n: int, discordant: float, change: float, holds: Callable[[Any, Any], Any]) -> float:
    """Exact probability of a condition on the two counts that, once true, stays true as `only_second` grows.

    only_first is binomial; given it, only_second is. So it takes one threshold for each value of only_first, found
    for all of them at once by bisection, instead of a sum over all pairs.
    """
    import numpy as np
    from scipy.special import bdtr, gammaln, xlog1py, xlogy

    first, second = (discordant - change) / 2, (discordant + change) / 2
    if n < 1 or not (0 <= first <= 1 and 0 <= second <= 1 and discordant <= 1):
        raise EdgekitError(f"a change of {change:g} with a share of {discordant:g} changing sides is impossible")
    counts = np.arange(n + 1.0)
    ways = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    weights = np.exp(ways + xlogy(counts, first) + xlog1py(n - counts, -first))
    counts, weights = counts[weights > 1e-15], weights[weights > 1e-15]
    low, high = np.full(len(counts), -1.0), n - counts + 1  # taken as false at low, as true at high
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)  # -1 only where 0 is known to be true
        true = holds(counts, np.maximum(middle, 0))
        low, high = np.where(true, low, middle), np.where(true, middle, high)
    share = second / (1 - first) if first < 1 else 0.0
    missed = np.where(high > 0, bdtr(np.maximum(high - 1, 0), (n - counts).astype(np.int64), share), 0.0)
    return float(min(1.0, max(0.0, (weights * (1 - missed)).sum())))


def fewest(tolerance: float, confidence: float = CONFIDENCE) -> int:
    """The smallest sample that can say 'survived' at all: with fewer, a file that changes no answer does not pass."""
    z = _z(confidence)
    return max(1, math.ceil(z * z * (1 - tolerance) / tolerance)) if tolerance > 0 else 2**63 - 1


def smallest_loss_found(
    n: int, tolerance: float, discordant: float = CHANGE_SIDES, confidence: float = CONFIDENCE
) -> float | None:
    """The smallest real loss, in steps of 0.1 points, that is called lost with probability 0.9; None if none is.

    Args:
        discordant: the share of samples that would change sides without any loss; the loss comes on top.
    """

    def found(tenths: int) -> bool:
        loss = tenths / 1000
        return power_to_lose(n, min(1.0, discordant + loss), tolerance, -loss, confidence) >= LIKELY

    low, high = 0, math.floor((1 - discordant) * 1000)
    if not found(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high / 1000


def power_sentence(
    n: int,
    tolerance: float,
    clean_tolerance: float | None = None,
    *,
    discordant: float = CHANGE_SIDES,
    confidence: float = CONFIDENCE,
) -> str:
    """One sentence, to be said before anything is attacked: what `n` samples can decide. It gives no advice."""
    strictest = min(tolerance, tolerance if clean_tolerance is None else clean_tolerance)
    if n < (needed := fewest(strictest, confidence)):
        least = f"that takes {needed:,}" if strictest > 0 else "as any number would be"
        survive = f"too few to say 'survived' within {points(strictest)} of a file that changes no answer ({least})"
    else:
        chance = power(n, discordant, tolerance, 0.0, confidence)
        survive = (
            f"if a file's robust accuracy really equals the student's and {100 * discordant:g} % of the samples "
            f"change sides, 'survived' within {points(tolerance)} is reached with probability {_two_digits(chance)}"
        )
    loss = smallest_loss_found(n, tolerance, discordant, confidence)
    if loss is None:
        lose = f"no loss, however large, is called 'lost' with probability {LIKELY:g}"
    else:
        lose = f"a real loss of {points(loss)} or more is called 'lost' with probability {LIKELY:g} at least"
    return f"{n:,} samples: {survive}; {lose}."


def nearest_rank(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed: one of them, never a mean of two."""
    if not values or not 0 < percent <= 100:
        raise EdgekitError(f"there is no percentile {percent} of {len(values)} values")
    return sorted(values)[-(-percent * len(values) // 100) - 1]


def front(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Which choices are on the Pareto front: no other costs as little and gains as much, and is better in one of both.

    Equal choices are on it together.
    """
    on, most, cheapest = [False] * len(costs), -math.inf, math.inf
    # From the cheapest on, of equally cheap ones the best first: a later one must gain more than all before it.
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -gains[place])):
        if gains[place] > most or (gains[place] == most and costs[place] == cheapest):
            on[place], most, cheapest = True, gains[place], costs[place]
    return on


def points(fraction: float) -> str:
    """0.02 -> "2 points"."""
    value = f"{100 * fraction:.4g}"
    return f"{value} point{'s' * (value != '1')}"


def _two_digits(probability: float) -> str:
    return "above 0.99" if probability > 0.995 else "below 0.01" if probability < 0.005 else f"{probability:.2f}"
