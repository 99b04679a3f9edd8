"""Numbers of curves and of seeds, from arrays alone."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

INFINITY = float("inf")


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


class Reached(NamedTuple):
    """When a run was at a target.

    Attributes:
      cost: What it had cost by then, in the unit of the positions given; where the target was not
        reached, the whole budget, which the true cost is above.
      is_reached: Whether it was.
    """

    cost: float
    is_reached: bool


def running_median(loss: np.ndarray) -> np.ndarray:
    """Median of each evaluation and its two neighbours; infinite where that is no number.

    The first evaluation, of the untrained net, stays as it is. The last has but one neighbour, so
    it counts as one only: it takes the median of the evaluation before.

    Args:
      loss: At the evaluations, (e,); NaN once diverged.

    Returns:
      (e,).

    >>> running_median(np.array([4.0, 2.0, 3.0, 1.0, 0.5])).tolist()
    [4.0, 3.0, 2.0, 1.0, 1.0]
    """
    finite = np.where(np.isnan(loss), INFINITY, loss)
    if len(finite) < 3:
        return finite
    medians = np.median(np.lib.stride_tricks.sliding_window_view(finite, 3), axis=-1)
    return np.concatenate([finite[:1], medians, medians[-1:]])


def time_to_target(position: np.ndarray, loss: np.ndarray, target: float) -> Reached:
    """What it cost until the running median of the loss was at the target.

    Between evaluations the logarithm of the loss is linear in the position.

    Args:
      position: Examples, steps or seconds at each evaluation, (e,), increasing.
      loss: At the evaluations, (e,); NaN once diverged.
      target: A positive loss.

    >>> position, loss = np.arange(5) * 100.0, np.array([4.0, 4.0, 2.0, 0.5, 0.5])
    >>> time_to_target(position, loss, 1.0)
    Reached(cost=250.0, is_reached=True)
    >>> time_to_target(position, loss, 0.1)
    Reached(cost=400.0, is_reached=False)
    """
    cost = crossing(position, running_median(loss), target)
    reached = bool(np.isfinite(cost))
    return Reached(cost if reached else float(position[-1]), reached)


def late_accuracy(accuracy: np.ndarray) -> float:
    """The mean of the test accuracies measured in the last three evaluations; NaN of none.

    >>> late_accuracy(np.array([0.1, 0.4, 0.5, 0.6])).__round__(6)
    0.5
    """
    last = accuracy[-3:]
    measured = last[~np.isnan(last)]
    return float(np.mean(measured)) if len(measured) else float("nan")


def log_excess(
    losses: np.ndarray, best: np.ndarray | float, untrained: np.ndarray | float
) -> np.ndarray:
    """How much a method loses by a bad α: the mean over the grid of ln(final loss / best of all).

    Args:
      losses: Final losses, (..., rates); what diverged is NaN or infinite.
      best: The lowest final loss of all methods at any α, for each row, (...), or for all.
      untrained: The loss of the untrained net, above which no loss counts, for each row or for all.

    Returns:
      (...), 0 for a method that is best at every α.

    >>> float(np.exp(log_excess(np.array([1.0, 4.0, np.inf]), 1.0, untrained=2.0))).__round__(3)
    1.587
    """
    capped = np.fmin(losses, np.asarray(untrained)[..., None])  # which takes NaN for the larger
    excess: np.ndarray = np.mean(np.log(capped / np.asarray(best)[..., None]), axis=-1)
    return excess


class Choice(NamedTuple):
    """The learning rate of a method.

    Attributes:
      rate: That of the lowest mean over seeds of ln final loss.
      extend: The rate by which to extend the grid first, where the best one is at its edge.
    """

    rate: float
    extend: float | None


def choose_rate(rates: Sequence[float], losses: np.ndarray) -> Choice:
    """The learning rate of the lowest mean over seeds of ln final loss.

    Args:
      rates: The grid, increasing, with a constant ratio.
      losses: Final losses, (rates, seeds); a rate at which a seed diverged is not chosen unless
        all are so.

    Raises:
      ValueError: There are less than two rates, so that no edge can be told.

    >>> choose_rate([0.1, 0.2, 0.4], np.array([[0.5, 0.5], [0.1, 0.4], [0.1, np.inf]]))
    Choice(rate=0.2, extend=None)
    >>> choose_rate([0.1, 0.2, 0.4], np.array([[0.5], [0.4], [0.3]]))
    Choice(rate=0.4, extend=0.8)
    """
    if len(rates) < 2:
        raise ValueError(f"choosing a learning rate takes at least two, got {list(rates)}.")
    means = np.mean(np.log(np.where(np.isnan(losses), INFINITY, losses)), axis=1)
    best = int(np.argmin(means))
    beyond = {0: rates[0] ** 2 / rates[1], len(rates) - 1: rates[-1] ** 2 / rates[-2]}
    extend = beyond.get(best)
    return Choice(rates[best], None if extend is None else float(f"{extend:.6g}"))


def at_batch_size(batch_size: float, sizes: Sequence[int], values: np.ndarray) -> np.ndarray:
    """What a constant size equal to a method's own mean size would give.

    It is interpolated between the constant sizes that were run, linearly in ln m; beyond them there
    is nothing to compare with. Give logarithms of losses and of times: they are close to linear.

    Args:
      batch_size: The mean batch size of the method, examples over steps.
      sizes: The constant sizes, increasing, (k,).
      values: What they gave, (k, ...).

    Returns:
      (...), NaN beyond the sizes that were run.

    >>> at_batch_size(32, [16, 128], np.array([[1.0], [4.0]])).tolist()
    [2.0]
    """
    at = np.interp(np.log(batch_size), np.log(sizes), np.arange(len(sizes)), np.nan, np.nan)
    if np.isnan(at):
        return np.full(np.shape(values)[1:], np.nan)
    low = min(int(at), len(sizes) - 2) if len(sizes) > 1 else 0
    high = min(low + 1, len(sizes) - 1)
    between: np.ndarray = values[low] + (at - low) * (values[high] - values[low])
    return between


def noise_floor(
    learning_rate: float, gradient_variance: np.ndarray, batch_size: np.ndarray
) -> np.ndarray:
    """How far above the optimum the noise of the gradient holds SGD: α·ξ/(4m).

    On a quadratic of curvature L the loss settles at α·ξ/(2m(2 − αL)), this for αL small beside 2.

    Args:
      learning_rate: α.
      gradient_variance: ξ, the trace of the covariance of one example's gradient.
      batch_size: m, broadcast with ξ.

    >>> float(noise_floor(0.1, np.float64(8.0), np.float64(16.0)))
    0.0125
    """
    floor: np.ndarray = learning_rate * gradient_variance / (4 * batch_size)
    return floor
