"""Averaged weights, kept beside any optimizer: what a smaller noise floor costs without a rule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cabs_jax.statistics import PyTree
from experiments.training.config import LARGEST_COUNT

DECAY = 0.99  # of the exponential average, a step
POWER = 3.0  # of the polynomial-decay average
NAMES = ("exponential", "polynomial")


class AveragedState(NamedTuple):
    """State of `with_averages`.

    Attributes:
      exponential: Exponential average of the parameters over the steps, like the parameters.
      polynomial: Polynomial-decay average over the examples (Shamir and Zhang 2013): those at the
        n'-th of n examples have a weight of about (n'/n)³.
      examples: Number of examples seen, int32 scalar, at most 2³¹ − 1.
      optimizer: State of the optimizer.
    """

    exponential: PyTree
    polynomial: PyTree
    examples: jax.Array
    optimizer: optax.OptState


def with_averages(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, which also averages the parameters that it leads to."""

    def init(params: PyTree) -> AveragedState:
        exponential, polynomial = (jax.tree.map(jnp.copy, params) for _ in NAMES)
        zero = jnp.zeros((), jnp.int32)
        return AveragedState(exponential, polynomial, zero, optimizer.init(params))

    def update(
        updates: PyTree,
        state: AveragedState,
        params: PyTree = None,
        *,
        moments: Any,
        **extra_args: Any,
    ) -> tuple[PyTree, AveragedState]:
        steps, inner = optimizer.update(
            updates, state.optimizer, params, moments=moments, **extra_args
        )
        new = optax.apply_updates(params, steps)
        room = LARGEST_COUNT - state.examples
        examples = state.examples + jnp.minimum(moments.count, room)
        count, seen = moments.count.astype(jnp.float32), examples.astype(jnp.float32)
        weight = jnp.minimum(1.0, (1 + POWER) * count / (seen + POWER * count))
        return steps, AveragedState(
            optax.incremental_update(new, state.exponential, 1 - DECAY),
            optax.incremental_update(new, state.polynomial, weight),
            examples,
            inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
