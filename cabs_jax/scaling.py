"""What follows the batch size: the length of the step, and what Adam remembers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cabs_jax._arguments import check_batch_size, check_number
from cabs_jax.sizing import unless_empty
from cabs_jax.statistics import GradientMoments, PyTree
from cabs_jax.step_moments import check_moments, read_count


def scale_with_batch_size(
    power: ArrayLike = 0.5, reference: int = 256
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by (m/reference)^power, m being the number of examples of this step.

    Put it last in a chain, where it scales the learning rate. Common powers are 0.5 (square root
    scaling, for Adam) and 1 (linear scaling, for gradient descent), where a larger batch is to take
    larger steps, and −0.5 beside `rules.seesaw`. `update` needs `moments` or `count`.

    Args:
      power: Exponent; 0 leaves the updates as they are.
      reference: Number of examples for which the learning rate was chosen, in [1, 2**31 − 1].

    Returns:
      An optax transformation without a state.

    Raises:
      ValueError: If an argument is not finite or out of range; from `update`, if it is given
        neither `moments` nor `count`.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), scale_with_batch_size(0.5, reference=256))
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params, count=1024)
      >>> print(updates)
      [-0.2 -0.2]

    References:
      Malladi, Lyu, Panigrahi and Arora, [On the SDEs and Scaling Rules for Adaptive Gradient
      Algorithms](https://arxiv.org/abs/2205.10287), 2022, for the square root.
    """
    check_number("power", power, "a finite number", lambda _: True)
    expected = check_batch_size("reference", reference)

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree = None,
        *,
        moments: GradientMoments | None = None,
        count: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        # An empty batch makes no step, so that its factor does not matter but must be finite.
        number = _examples("scale_with_batch_size", moments, count)
        size = jnp.maximum(number, 1).astype(jnp.float32)
        factor = (size / jnp.asarray(expected, jnp.float32)) ** jnp.asarray(power, jnp.float32)
        return jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`.

    Attributes:
      step: Steps made, an int32 scalar.
      weight: What the weights in `nu` add up to, a float32 scalar.
      mu: Average of the gradients, a tree like the parameters; it lacks 1 − b1^step of its weight.
      nu: Average of their squares likewise, float32.
    """

    step: jax.Array
    weight: jax.Array
    mu: PyTree
    nu: PyTree


def scale_by_adam(
    half_life: ArrayLike, b1: ArrayLike = 0.9, eps: ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, of squares that are forgotten by examples and not by steps.

    As in `optax.scale_by_adam`, but for β₂ = 2^(−m/half_life) in a step of m examples: the average
    of the squares is one over the same examples, whatever the sizes of the batches were. `update`
    needs `moments` or `count`; an empty batch leaves everything as it is.

    Args:
      half_life: Examples after which a square has half its weight, positive. b2 at batch size m is
        half_life = m·ln 2/−ln b2: 0.999 at 256 are 177,357 examples.
      b1: Decay of the average of the gradients, a step, in [0, 1).
      eps: Added to the root of the average of the squares; at least 0.

    Returns:
      An optax transformation with a `ScaleByAdamState`.

    Raises:
      ValueError: If an argument is out of range; from `update`, if it is given neither `moments`
        nor `count`.

    Example:
      >>> tx = optax.chain(scale_by_adam(half_life=1000), optax.scale_by_learning_rate(0.1))
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([1.0, -3.0]), tx.init(params), params, count=64)
      >>> print(jnp.round(updates, 3))
      [-0.1  0.1]

    References:
      Marek, Lotfi, Somasundaram, Wilson and Goldblum, [Small Batch Size Training for Language
      Models](https://arxiv.org/abs/2507.07101), 2025.
    """
    check_number("half_life", half_life, "a positive number", lambda x: x > 0)
    check_number("b1", b1, "in [0, 1)", lambda x: 0 <= x < 1)
    check_number("eps", eps, "a non-negative number", lambda x: x >= 0)

    def init(params: PyTree) -> ScaleByAdamState:
        zeros = optax.tree.zeros_like(params), optax.tree.zeros_like(params, dtype=jnp.float32)
        return ScaleByAdamState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), *zeros)

    def update(
        updates: PyTree,
        state: ScaleByAdamState,
        params: PyTree = None,
        *,
        moments: GradientMoments | None = None,
        count: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByAdamState]:
        del params, extra_args
        examples = _examples("scale_by_adam", moments, count)
        # 1 − β₂, without the digits that a subtraction from 1 would cost.
        share = -jnp.expm1(-math.log(2) * examples.astype(jnp.float32) / half_life)
        step, weight = state.step + 1, state.weight + share * (1 - state.weight)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)

        def squared(old: jax.Array, g: jax.Array) -> jax.Array:
            return old + share * (jnp.square(g.astype(jnp.float32)) - old)

        nu = jax.tree.map(squared, state.nu, updates)
        unbiased = optax.tree.bias_correction(mu, b1, step)

        def direction(average: jax.Array, square: jax.Array) -> jax.Array:
            root = jnp.sqrt(square / jnp.where(weight > 0, weight, 1))
            return (average.astype(jnp.float32) / (root + eps)).astype(average.dtype)

        directed = jax.tree.map(direction, unbiased, nu)
        return unless_empty(examples, directed, ScaleByAdamState(step, weight, mu, nu), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _examples(name: str, moments: GradientMoments | None, count: Any) -> jax.Array:
    """The number of examples of this step, an int32 scalar."""
    if moments is not None:
        check_moments(moments, count=count)
        count = moments.count
    if count is None:
        raise ValueError(
            f"{name} goes by the number of examples: pass moments= or count= to update, got "
            "count=None."
        )
    return read_count(count)
