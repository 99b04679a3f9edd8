"""What seeds decide: t-intervals of differences paired by seed, and verdicts from them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.report.statistics import Reached

CONFIRMED, CONTRADICTED, UNDECIDED = "confirmed", "contradicted", "undecided"
CONFIDENCE = 0.95
MOST_SEEDS = 1000


class Interval(NamedTuple):
    """The mean of one number a seed and its 95 % t-interval.

    Attributes:
      mean: Over seeds.
      low: The lower end; minus infinity of a single seed.
      high: The upper end; infinity of a single seed.
      deviation: The standard deviation over seeds, with divisor n − 1; NaN of a single seed.
      seeds: How many there are.
    """

    mean: float
    low: float
    high: float
    deviation: float
    seeds: int


class Comparison(NamedTuple):
    """One method's cost to reach targets relative to another's.

    Attributes:
      log_ratio: Of the natural logarithm of the geometric mean, over targets, of ours / theirs.
      targets: Those that count: at least one run of either side reaches them.
      ours_unreached: How many of our runs to them have only a bound, so that the ratio is at least
        what it seems.
      theirs_unreached: How many of theirs, so that it is at most what it seems.
    """

    log_ratio: Interval
    targets: tuple[float, ...]
    ours_unreached: int
    theirs_unreached: int

    @property
    def ratio(self) -> float:
        """The geometric mean over targets and seeds of ours / theirs."""
        return float(np.exp(self.log_ratio.mean))


class Verdict(NamedTuple):
    """What an interval says of a claim.

    Attributes:
      verdict: `CONFIRMED`, `CONTRADICTED` or `UNDECIDED`.
      seeds_to_decide: Where undecided, how many seeds of this mean and deviation would decide it;
        None where more than `MOST_SEEDS`, or a single seed tells no deviation.
    """

    verdict: str
    seeds_to_decide: int | None = None


def t_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The 95 % t-interval of the mean of independent values, one a seed.

    Args:
      values: (seeds,), finite.

    Raises:
      ValueError: There is none, or one is not finite.

    >>> interval = t_interval([1.0, 2.0, 3.0])
    >>> [round(x, 3) for x in (interval.low, interval.mean, interval.high)]
    [-0.484, 2.0, 4.484]
    """
    array = np.asarray(values, float)
    if not len(array) or not np.all(np.isfinite(array)):
        raise ValueError(f"an interval takes finite values, one a seed, got {array.tolist()}.")
    mean = float(np.mean(array))
    if len(array) == 1:
        return Interval(mean, -np.inf, np.inf, np.nan, 1)
    deviation = float(np.std(array, ddof=1))
    half = _half_width(deviation, len(array))
    return Interval(mean, mean - half, mean + half, deviation, len(array))


def compare(
    ours: Sequence[Sequence[Reached]],
    theirs: Sequence[Sequence[Reached]],
    targets: Sequence[float],
) -> Comparison | None:
    """The costs of one method relative to those of another, paired by seed.

    For each seed, the mean over targets of ln(ours / theirs); of these, one a seed, the t-interval.
    A target that no run of either side reaches is dropped: it says nothing.

    Args:
      ours: Of each target and seed, [targets][seeds].
      theirs: Likewise, with the same seeds in the same order.
      targets: The training losses.

    Returns:
      The comparison, or None if no target is left.

    Raises:
      ValueError: The seeds of the two differ in number, or an untrained net meets a target.
    """
    kept, logs, unreached = [], [], [0, 0]
    for target, own, other in zip(targets, ours, theirs, strict=True):
        if len(own) != len(other):
            raise ValueError(f"pairs take the same seeds, got {len(own)} and {len(other)} runs.")
        if not any(run.is_reached for run in (*own, *other)):
            continue
        if min(run.cost for run in (*own, *other)) <= 0:
            raise ValueError(f"a net is at the target {target:g} untrained; choose a lower one.")
        kept.append(target)
        pairs = zip(own, other, strict=True)
        logs.append([math.log(one.cost / another.cost) for one, another in pairs])
        unreached[0] += sum(not run.is_reached for run in own)
        unreached[1] += sum(not run.is_reached for run in other)
    if not kept:
        return None
    return Comparison(t_interval(np.mean(logs, axis=0)), tuple(kept), *unreached)


def decide(interval: Interval, limit: float, claim: str = "below") -> Verdict:
    """Whether the interval lies on the claimed side of `limit`, on the other, or across it.

    Args:
      interval: Of the number that the claim is about.
      limit: Such as 0 for "cheaper", ln 1.05 for "at most 5 % above".
      claim: "below" or "above".

    Raises:
      ValueError: `claim` is neither.

    >>> decide(Interval(-1.0, -1.5, -0.5, 0.2, 5), 0.0)
    Verdict(verdict='confirmed', seeds_to_decide=None)
    """
    if claim not in ("below", "above"):
        raise ValueError(f'a claim is "below" or "above", got {claim!r}.')
    is_below, is_above = interval.high < limit, interval.low > limit
    if is_below or is_above:
        agrees = is_below if claim == "below" else is_above
        return Verdict(CONFIRMED if agrees else CONTRADICTED)
    return Verdict(UNDECIDED, seeds_to_decide(interval, limit))


def seeds_to_decide(interval: Interval, limit: float) -> int | None:
    """The fewest seeds whose interval, of the same mean and deviation, leaves out `limit`.

    >>> seeds_to_decide(Interval(-1.0, -3.0, 1.0, 1.0, 3), 0.0)
    7
    """
    distance = abs(interval.mean - limit)
    if np.isnan(interval.deviation):
        return None
    for seeds in range(2, MOST_SEEDS + 1):
        if _half_width(interval.deviation, seeds) < distance:
            return seeds
    return None


def _half_width(deviation: float, seeds: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * deviation / math.sqrt(seeds)
