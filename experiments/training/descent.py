"""Gradient descent after `adapt_batch_size`, whose learning rate may depend on what was seen."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import cabs_jax
from cabs_jax.state import AdaptBatchSizeState

MILESTONES = (0.5, 0.75)  # fractions of the examples of a run
QUARTERS = (0.25, 0.5, 0.75)
STEP_DECAY = 0.1


class Observed(NamedTuple):
    """What a learning rate may depend on.

    Attributes:
      examples: seen before this step, int32 scalar.
      count: examples of this step's batch, int32 scalar.
      adapted: state of `adapt_batch_size` after this step.
    """

    examples: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple.count is not missed
    adapted: AdaptBatchSizeState


Rate = Callable[[Observed], jax.Array]


def constant(learning_rate: float) -> Rate:
    """The same learning rate at every step."""
    return lambda observed: jnp.float32(learning_rate)


def step_decay(learning_rate: float, examples: int) -> Rate:
    """A tenth of the learning rate from half of the run's examples on, a hundredth from 3/4 on."""
    starts = jnp.array(milestones(examples), jnp.int32)

    def rate(observed: Observed) -> jax.Array:
        passed = jnp.sum(observed.examples >= starts, dtype=jnp.float32)
        decayed: jax.Array = learning_rate * jnp.float32(STEP_DECAY) ** passed
        return decayed

    return rate


def cosine(learning_rate: float, examples: int) -> Rate:
    """Half a period of a cosine, from the learning rate to 0 over the run's examples."""

    def rate(observed: Observed) -> jax.Array:
        fraction = jnp.minimum(observed.examples.astype(jnp.float32) / examples, 1.0)
        decayed: jax.Array = learning_rate / 2 * (1 + jnp.cos(math.pi * fraction))
        return decayed

    return rate


def noise_scaled(largest: float) -> Rate:
    """McCandlish et al. 2018, eq. 2.6: ε_max/(1 + 𝓑/m), for m examples at noise scale 𝓑 = ξ/‖∇F‖².

    𝓑 is what `rules.noise_scale` asks for; where it is infinite, as no gradient is to be seen in
    the noise, the step is 0.
    """

    def rate(observed: Observed) -> jax.Array:
        noise_scale = observed.adapted.info.raw_batch_size
        count = jnp.maximum(observed.count, 1).astype(jnp.float32)
        scaled: jax.Array = largest / (1 + noise_scale / count)
        return scaled

    return rate


def milestones(examples: int, fractions: Sequence[float] = MILESTONES) -> list[int]:
    """Fractions of a run's examples; by default those after which `step_decay` takes effect."""
    return [math.ceil(fraction * examples) for fraction in fractions]


def scaled(learning_rate: float, reference: int, power: float) -> Rate:
    """α·(m/reference)^power for a batch of m examples."""

    def rate(observed: Observed) -> jax.Array:
        size = jnp.maximum(observed.count, 1).astype(jnp.float32)  # before the first step it is 0
        scaled: jax.Array = learning_rate * (size / reference) ** power
        return scaled

    return rate


def ramp(first: int, examples: int) -> list[tuple[int, int]]:
    """For `rules.schedule`: twice the size after each quarter of the run's examples."""
    return _rising(first, 2.0, milestones(examples, QUARTERS))


def growing_sizes(first: int, examples: int) -> list[tuple[int, int]]:
    """For `rules.schedule`: ten times the size where `step_decay` takes a tenth of the rate."""
    return _rising(first, 1 / STEP_DECAY, milestones(examples))


def _rising(first: int, factor: float, starts: Sequence[int]) -> list[tuple[int, int]]:
    return [(start, round(first * factor**k)) for k, start in enumerate([0, *starts])]


class DescentState(NamedTuple):
    """State of `descend`.

    Attributes:
      examples: seen so far, int32 scalar.
      learning_rate: of the last update, float32 scalar.
      adapt: state of `adapt_batch_size`.
      direction: state of what turns the mean gradient into a direction.
    """

    examples: jax.Array
    learning_rate: jax.Array
    adapt: AdaptBatchSizeState
    direction: optax.OptState


def descend(
    adapt: optax.GradientTransformationExtraArgs,
    direction: optax.GradientTransformation,
    rate: Rate,
) -> optax.GradientTransformationExtraArgs:
    """Steps by −rate along the direction of the mean gradient; `update` needs `moments`."""

    def init(params: Any) -> DescentState:
        zero = jnp.zeros((), jnp.int32)
        adapted = adapt.init(params)
        start = jnp.asarray(rate(Observed(zero, zero, adapted)), jnp.float32)
        return DescentState(zero, start, adapted, direction.init(params))

    def update(
        updates: Any,
        state: DescentState,
        params: Any = None,
        *,
        moments: cabs_jax.GradientMoments,
        **extra_args: Any,
    ) -> tuple[Any, DescentState]:
        count = moments.count
        mean, adapted = adapt.update(updates, state.adapt, params, moments=moments, **extra_args)
        directed, direction_state = direction.update(mean, state.direction, params)
        learning_rate = rate(Observed(state.examples, count, adapted))
        steps = jax.tree.map(lambda d: -learning_rate.astype(d.dtype) * d, directed)
        return steps, DescentState(state.examples + count, learning_rate, adapted, direction_state)

    return optax.GradientTransformationExtraArgs(init, update)
