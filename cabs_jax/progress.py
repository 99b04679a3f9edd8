"""F − F*, the loss that is left to lose, estimated from the progress of the loss itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cabs_jax.statistics import is_absurd

_LOW_BITS = 30
_EXCESS_DECAY = 0.99
_SLOW, _FAST = 1.0, 7.0
# The examples that the first batches are taken to have had at least; it tames the first averages.
_OFFSET = 16.0


class ExampleCount(NamedTuple):
    """A number of examples, high·2³⁰ + low; int32 scalars, since one int32 ends at 2·10⁹."""

    high: jax.Array
    low: jax.Array


class Progress(NamedTuple):
    """Averages of the loss over the examples seen, old ones being forgotten in proportion.

    The polynomial-decay average S_η gives the loss at the n'-th of n examples a weight of about
    (n'/n)^η, so that its memory grows with the run. If F(n) = F* + A/n, it tends to
    F* + (1 + 1/η)·A/n: two of them tell F(n) − F* = A/n.

    Attributes:
      slow: S₁, float32 scalar.
      fast: S₇, float32 scalar.
      excess: Running average E of F(w) − F(w̄) on the same batches, w̄ being averaged weights;
        constant 0.99 a step, float32 scalar. Where noise holds the loss up it is about the loss
        that the noise costs; where the weights are still on their way it is negative.

    References:
      Shamir and Zhang, [Stochastic Gradient Descent for Non-smooth
      Optimization](https://arxiv.org/abs/1212.1824), 2013, for the polynomial-decay average.
    """

    slow: jax.Array
    fast: jax.Array
    excess: jax.Array

    @property
    def gap(self) -> jax.Array:
        """The estimate of F − F*, float32 scalar; ≤ 0 where the loss does not fall."""
        return (self.slow - self.fast) / (1 / _SLOW - 1 / _FAST)


def no_progress() -> Progress:
    """Returns the averages before the first step, no two of which share their memory."""
    return Progress(*(jnp.zeros((), jnp.float32) for _ in Progress._fields))


def advance(
    progress: Progress,
    value: jax.Array,
    averaged_value: jax.Array | None,
    count: jax.Array,
    examples: jax.Array,
    first: jax.Array,
) -> Progress:
    """Returns the averages after a batch.

    Args:
      progress: Those before it.
      value: Mean loss of the batch, float32 scalar.
      averaged_value: Mean loss of the averaged weights on it, float32 scalar; None or NaN where it
        was not measured.
      count: Number of its examples, int32 scalar.
      examples: Number of examples seen, those of the batch included, float32 scalar.
      first: Whether there was no batch before it, a boolean scalar.
    """
    size = count.astype(jnp.float32)

    def average(old: jax.Array, power: float) -> jax.Array:
        weight = jnp.minimum(1.0, (1 + power) * size / (examples + power * _OFFSET))
        afresh = first | is_absurd(old, value)
        return old + jnp.where(afresh, 1.0, weight) * (value - old)

    excess = progress.excess
    if averaged_value is not None:
        averaged = _EXCESS_DECAY * excess + (1 - _EXCESS_DECAY) * (value - averaged_value)
        excess = jnp.where(jnp.isfinite(averaged_value), averaged, excess)
    return Progress(average(progress.slow, _SLOW), average(progress.fast, _FAST), excess)


def no_examples() -> ExampleCount:
    """Returns a count of zero examples, its parts in memory of their own."""
    return ExampleCount(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add_examples(examples: ExampleCount, count: jax.Array) -> ExampleCount:
    """Returns a count with the examples of a batch added, exactly."""
    mask = (1 << _LOW_BITS) - 1
    # Both terms lie below 2³⁰, so that the sum does not overflow.
    low = examples.low + (count & mask)
    return ExampleCount(
        examples.high + (count >> _LOW_BITS) + (low >> _LOW_BITS), jnp.asarray(low & mask)
    )


def as_float32(examples: ExampleCount) -> jax.Array:
    """Returns a count of examples as the nearest float32."""
    high, low = (part.astype(jnp.float32) for part in examples)
    return high * 2.0**_LOW_BITS + low
