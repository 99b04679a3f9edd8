"""Learning rates, scalars or schedules, as rules and optimizers take them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cabs_jax._arguments import check_number, is_traced

ScalarOrSchedule = ArrayLike | Callable[[jax.Array], ArrayLike]

# Where a schedule is looked at before the run.
_PROBED_STEPS = [0, *(2**k for k in range(24))]


def check_learning_rate(learning_rate: ScalarOrSchedule) -> None:
    """Raises ValueError unless a learning rate is a schedule or a non-negative scalar."""
    if not callable(learning_rate):
        check_number(
            "learning_rate", learning_rate, "a non-negative number or a schedule", lambda x: x >= 0
        )


def check_coupled(learning_rate: ScalarOrSchedule) -> None:
    """Checks a learning rate as above, and warns of one that takes the batch size down with it."""
    check_learning_rate(learning_rate)
    if not callable(learning_rate):
        return
    with jax.ensure_compile_time_eval():
        answers = [learning_rate(jnp.int32(step)) for step in _PROBED_STEPS]
    if any(map(is_traced, answers)):
        return
    rates = np.asarray(answers, np.float32)
    first = int(rates.argmax())
    if rates[first] > 0 and rates[-1] < rates[first] / 2:
        warnings.warn(
            f"the learning rate falls from {rates[first]:.3g} at step {_PROBED_STEPS[first]} to "
            f"{rates[-1]:.3g}, and a batch size coupled to it falls too, so that the noise does "
            "not. Couple the size to the peak, and scale the step behind it: "
            "chain(cabs(peak), optax.scale_by_schedule(factor)); or keep the rate up, as a growing "
            "batch does what the decay would.",
            stacklevel=3,
        )


def at_step(learning_rate: ScalarOrSchedule, step: jax.Array) -> ArrayLike:
    """Returns the learning rate of a step.

    Raises:
      ValueError: If a schedule gives a negative one, unless it is traced.
    """
    if not callable(learning_rate):
        return learning_rate
    rate = learning_rate(step)
    if not is_traced(rate) and np.any(np.asarray(rate) < 0):
        raise ValueError(
            f"the learning rate must be non-negative, but the schedule gives {rate} at step {step}."
        )
    return rate
