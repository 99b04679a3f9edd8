"""Numbers of curves and of seeds, from arrays alone."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

INFINITY = float("inf")


class Spread(NamedTuple):
    """The median over seeds and the extremes."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Median and extremes; NaN counts as infinite."""
    array = np.array([INFINITY if np.isnan(value) else value for value in values])
    ordered = np.sort(array)
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return Spread(float(np.mean(middle)), float(ordered[0]), float(ordered[-1]))


def crossing(position: np.ndarray, loss: np.ndarray, target: float) -> float:
    """Where `loss` first is at the target, its logarithm linear between evaluations."""
    at = np.flatnonzero(loss <= target)
    if not len(at):
        return INFINITY
    i = int(at[0])
    if i == 0 or loss[i] <= 0 or not np.isfinite(loss[i - 1]):
        return float(position[i])
    above, below = np.log(loss[i - 1]), np.log(loss[i])
    fraction = (above - np.log(target)) / (above - below)
    return float(position[i - 1] + fraction * (position[i] - position[i - 1]))


def decades_within(rates: Sequence[float], losses: Sequence[float], limit: float) -> float:
    """Decades of the learning rate for which the final loss is at most `limit`.

    The loss's logarithm is taken to be linear in the rate's between the points of the grid; beside
    a point where runs diverged, nothing counts.
    """
    total = 0.0
    points = zip(rates, losses, strict=True)
    for (rate, loss), (next_rate, next_loss) in itertools.pairwise(points):
        width = float(np.log10(next_rate / rate))
        low, high = sorted((loss, next_loss))
        if high <= limit:
            total += width
        elif 0 < low < limit and np.isfinite(high):
            total += width * float(np.log(limit / low) / np.log(high / low))
    return total
