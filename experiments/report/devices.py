"""Who gains: the numbers of devices from which on, or up to which, a method is the quickest.

A step of m examples takes t(m) = a + b·m/devices seconds: a for what every step costs, b for an
example. A run of n examples in s steps then takes a·s + b·n/devices.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize


class StepCost(NamedTuple):
    """Seconds of a step: `step + example · m / devices`."""

    step: float
    example: float


class Work(NamedTuple):
    """What a method takes to its goal; means over seeds may be fractions."""

    steps: float
    examples: float


def fit_step_cost(sizes: Sequence[int] | np.ndarray, seconds: np.ndarray) -> StepCost:
    """The costs a and b, neither below 0, of the least squares of relative errors.

    Args:
      sizes: Batch sizes on one device, (k,), at least two different ones.
      seconds: Of a step of each, (k,), positive.

    Raises:
      ValueError: There are less than two sizes, or a time is not positive.

    >>> cost = fit_step_cost([16, 64, 256], 0.01 + 0.001 * np.array([16, 64, 256]))
    >>> [round(x, 6) for x in cost]
    [0.01, 0.001]
    """
    sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
    if len(set(sizes.tolist())) < 2 or not np.all(seconds > 0):
        raise ValueError(
            "the cost of a step takes positive seconds of two batch sizes or more, "
            f"got {dict(zip(sizes.tolist(), seconds.tolist(), strict=True))}."
        )
    relative = np.stack([1 / seconds, sizes / seconds], axis=1)
    step, example = optimize.nnls(relative, np.ones(len(sizes)))[0]
    return StepCost(float(step), float(example))


def seconds(work: Work, cost: StepCost, devices: float | np.ndarray) -> np.ndarray:
    """Seconds of the work on so many devices.

    >>> float(seconds(Work(steps=100, examples=1600), StepCost(0.01, 0.001), 4))
    1.4
    """
    return np.asarray(cost.step * work.steps + cost.example * work.examples / np.asarray(devices))


def quickest(works: Mapping[str, Work], cost: StepCost) -> dict[str, tuple[float, float]]:
    """From how many devices to how many each method is the quickest.

    Args:
      works: Of each method to the same goal.
      cost: Of a step.

    Returns:
      The first and the last number of devices, from 1 to infinity and not rounded, of each method
      that is the quickest anywhere, by increasing devices; of equals, that of the fewest steps.

    >>> works = {"small": Work(1000, 16_000), "large": Work(100, 32_000)}
    >>> quickest(works, StepCost(step=0.001, example=0.001))
    {'small': (1.0, 17.77...), 'large': (17.77..., inf)}
    """
    # Over x = 1 / devices in (0, 1] the seconds are straight lines: of these, the lower envelope.
    share, found = 1.0, {}
    name = min(works, key=lambda name: (float(seconds(works[name], cost, 1)), works[name].steps))
    while True:
        rate = works[name].examples
        crossings = {
            other: _crossing(works[name], work, cost)
            for other, work in works.items()
            if work.examples > rate and work.steps < works[name].steps
        }
        following = max(
            crossings, key=lambda other: (crossings[other], -works[other].steps), default=None
        )
        end = crossings[following] if following is not None else 0.0
        found[name] = (1 / share, 1 / end if end > 0 else np.inf)
        if following is None or end <= 0:
            return found
        name, share = following, min(share, end)


def _crossing(now: Work, then: Work, cost: StepCost) -> float:
    """The 1 / devices below which `then`, of more examples in fewer steps, is quicker."""
    saved, more = now.steps - then.steps, then.examples - now.examples
    return cost.step * saved / (cost.example * more) if cost.example * more > 0 else np.inf
