"""Rules that know the sizes beforehand; `cabs_jax.rules` offers them beside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cabs_jax._arguments import check_batch_size, check_non_negative
from cabs_jax.statistics import Rule, Statistics


def constant(size: ArrayLike) -> Rule:
    """Always asks for the same size.

    Args:
      size: Number of examples, in [1, 2**31 − 1].

    Returns:
      The rule.

    Raises:
      ValueError: If size is not a whole number in that range.
    """
    checked = check_batch_size("size", size)
    return lambda statistics: _float32(checked)


def schedule(sizes: Callable[[jax.Array], ArrayLike] | Sequence[tuple[int, int]]) -> Rule:
    """Asks for sizes that are known beforehand.

    The noise of a step goes with α/m: what a step decay does to it by dividing the learning rate,
    a schedule does that multiplies the size at the same numbers of examples.

    Args:
      sizes: Pairs `(examples, size)`: from the batch on that starts after so many examples, that
        size; the first pair is that of 0 examples. Needs `count`. Or a function of the index k of
        the step just made, from 0, an int32 scalar, to the size of the batch that follows it,
        k + 1, such as `optax.linear_schedule(64, 1024, 10_000)`. That of the first batch is
        `initial_batch_size` either way.

    Returns:
      The rule.

    Raises:
      TypeError: If sizes is neither.
      ValueError: If the pairs do not start at 0, or their examples do not increase, or a size is no
        whole number in [1, 2**31 − 1].

    Example:
      >>> import cabs_jax, jax.numpy as jnp
      >>> rule = schedule([(0, 64), (1_000_000, 256), (3_000_000, 1024)])
      >>> tx = cabs_jax.adapt_batch_size(rule, initial_batch_size=64)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> _, state = tx.update(jnp.ones(3), state, params, count=1_000_000)
      >>> print(cabs_jax.batch_size(state))
      256

    References:
      Smith, Kindermans, Ying and Le, [Don't Decay the Learning Rate, Increase the Batch
      Size](https://arxiv.org/abs/1711.00489), 2018.
    """
    if callable(sizes):
        size_at = sizes
        return lambda statistics: _float32(size_at(statistics.step))
    try:
        pairs = [(check_non_negative("each number of examples", n), size) for n, size in sizes]
    except (TypeError, ValueError) as error:
        raise TypeError(
            "sizes must be pairs (examples, size) or a function of the step, got "
            f"{sizes!r}; for a fixed size use rules.constant."
        ) from error
    starts = [examples for examples, _ in pairs]
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(
            f"sizes must start with (0, size) and go on with increasing examples, got {sizes!r}."
        )
    # NumPy, so that no array of a trace is kept.
    sizes_of = np.asarray(
        [float(check_batch_size("each size", size)) for _, size in pairs], np.float32
    )
    later = np.asarray(starts[1:], np.float32)

    def rule(statistics: Statistics) -> jax.Array:
        passed = jnp.sum(_examples(statistics, "schedule") >= later, dtype=jnp.int32)
        return jnp.asarray(sizes_of)[passed]

    return rule


def seesaw(
    learning_rate: Callable[[jax.Array], ArrayLike], batch_size: int, *, warmup_steps: int = 0
) -> Rule:
    """Doubles the batch where a schedule would halve the learning rate: m = m₀·α_max/α.

    In place of a run with batches of m₀ and the rate α(k) at step k, that is after k·m₀ examples,
    one that sees the same examples in fewer steps, the rate staying high:

    * gradient descent keeps α_max. With 1/m steps to an example, an example moves the parameters by
      α/m times its gradient and adds a variance of α²ξ/m²: α/m is what counts, α_max/m = α/m₀.
    * Adam and normalised gradient descent, where noise makes up most of the gradient, take steps of
      α/‖ḡ‖ ≈ α·√(m/ξ). For the same effect their rate goes with √(m₀/m), α/√2 for twice the
      batch: chain `scale_with_batch_size(-0.5, reference=m₀)` behind an optimizer of rate α_max.

      Until v̂ has forgotten the smaller batches, for some 1/(1 − b2) steps after a doubling, Adam
      is still gradient descent in this, and α/√2 too small: take a b2 that forgets in time.

    Both hold while noise dominates, that is while m is below the noise scale: `max_batch_size`
    is where the gain ends. Needs `count`.

    Args:
      learning_rate: The schedule to do the work of, called with the step k = n/m₀ after n examples,
        rounded down, an int32 scalar. Of its rates only ratios matter.
      batch_size: m₀, in [1, 2**31 − 1]; give it as `initial_batch_size` and as `min_batch_size`.
      warmup_steps: Number of first steps, in which the rate rises to α_max = α(warmup_steps) and
        the size is m₀; let the rate of the optimizer rise in them too.

    Returns:
      The rule. Where the schedule is at 0 it answers infinity.

    Raises:
      TypeError: If learning_rate is not callable, or warmup_steps no integer.
      ValueError: If batch_size is out of range, or warmup_steps negative.

    Example:
      >>> import cabs_jax, optax
      >>> cosine = optax.cosine_decay_schedule(0.1, decay_steps=10_000)
      >>> tx = optax.chain(
      ...     cabs_jax.adapt_batch_size(seesaw(cosine, 32), min_batch_size=32, max_batch_size=512),
      ...     optax.adam(0.1),
      ...     cabs_jax.scale_with_batch_size(-0.5, reference=32))

    References:
      Meterez, Morwani, Wu, Oncescu, Pehlevan and Kakade, [Seesaw: Accelerating Training by
      Balancing Learning Rate and Batch Size Scheduling](https://arxiv.org/abs/2510.14717), 2025.
    """
    if not callable(learning_rate):
        raise TypeError(f"learning_rate must be a schedule, got {learning_rate!r}.")
    first = check_batch_size("batch_size", batch_size)
    warmup = check_non_negative("warmup_steps", warmup_steps)

    def rule(statistics: Statistics) -> jax.Array:
        step = jnp.floor(_examples(statistics, "seesaw") / _float32(first)).astype(jnp.int32)
        rate = _float32(learning_rate(jnp.maximum(step, warmup)))
        peak = _float32(learning_rate(jnp.int32(warmup)))
        ratio = jnp.where(rate > 0, peak / jnp.where(rate > 0, rate, 1), jnp.inf)
        return _float32(first) * ratio

    return rule


def _examples(statistics: Statistics, rule_name: str) -> jax.Array:
    if statistics.examples is None:
        raise ValueError(
            f"rules.{rule_name} counts examples: pass count= or moments= to update, got count=None."
        )
    return statistics.examples


def _float32(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
