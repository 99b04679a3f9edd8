"""The optax transformation: moments → running averages → rule → rounding → batch size."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cabs_jax import rules
from cabs_jax._arguments import check_number
from cabs_jax.inputs import StepMoments, read_moments
from cabs_jax.rounding import (
    LegalSizes,
    RoundTo,
    check_initial_batch_size,
    legal_sizes,
    nearest_legal_size,
)
from cabs_jax.rules import Rule, Statistics
from cabs_jax.state import AdaptBatchSizeState, Info
from cabs_jax.statistics import tree_squared_norm

PyTree = Any


def adapt_batch_size(
    rule: Rule,
    *,
    min_batch_size: ArrayLike = 16,
    max_batch_size: ArrayLike = 2048,
    decay: ArrayLike = 0.95,
    debias: bool = False,
    initial_batch_size: ArrayLike | None = None,
    round_to: RoundTo = 1,
    axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages the gradient (path a) or passes it on (path b), and tracks the batch size.

    `update` takes what that of `cabs` takes, and returns the mean gradient. A rule of
    `cabs_jax.rules` that needs the squared norm of the gradient needs `count` on path (b).

    Within optax:

    * `chain`: first on path (a), since what follows expects mean gradients; on path (b) after
      whatever should change the gradient before its norm is taken. Adaptive steps and momentum
      follow it.
    * `inject_hyperparams` makes every number a tracer and every function a schedule: name `rule` in
      `static_args`, and the bounds, `initial_batch_size` and `round_to`, which are not checked
      where they are traced.
    * `masked`, `partition`: path (b). Path (a) would leave the example axis on the gradients that
      it does not see; so put `adapt_batch_size` first and partition what follows it.
    * `apply_if_finite`: around path (b); on path (a), which changes the shape of the updates as it
      must not, around what follows `adapt_batch_size`.
    * `reduce_on_plateau`: wants `value=losses.mean()`, which both paths take. The rule does not see
      the factor by which it reduces the step.
    * `MultiSteps` is the wrong tool: it passes on the extra arguments of the last micro-step alone,
      so loss and variance would be those of a fraction of the batch. Accumulate over microbatches
      inside the gradient instead, as `optax.microbatching` does.

    Args:
      rule: Function from `Statistics` to the batch size to aim at: one of `cabs_jax.rules`, or your
        own. Where it answers NaN the size stays as it was.
      min_batch_size: Smallest size, at least 1.
      max_batch_size: Largest size, at most 2**31 − 1.
      decay: Constant of the running averages, in [0, 1).
      debias: Whether the averages start at 0 and are divided by 1 − decay^n after n steps. If not,
        that of the loss starts at 1 and the others at 0.
      initial_batch_size: Size of the first batch, within the bounds, rounded to a legal size; the
        smallest legal size by default.
      round_to: An int k for the nearest multiple of k, half to even; or an increasing tuple of
        legal sizes, for the nearest in ratio. The state always holds a legal size.
      axis_name: Mapped axis over which path (a) is split, inside a `shard_map` of one's own.

    Returns:
      An optax transformation with an `AdaptBatchSizeState`.

    Raises:
      TypeError: If rule is not callable.
      ValueError: If an argument is out of range, or if no legal size lies within the bounds. Values
        traced by JAX are not checked. `update` raises it for arguments that disagree in shape.

    Example:
      CABS with momentum, put together by hand (`cabs` has it as an argument): the effective
      learning rate is α/(1 − β).

      >>> import cabs_jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(
      ...     cabs_jax.adapt_batch_size(cabs_jax.rules.cabs(0.1 / (1 - 0.9))),
      ...     optax.trace(0.9),
      ...     optax.scale_by_learning_rate(0.1))
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.array([[3.0, 0.0], [1.0, 2.0]])}
      >>> updates, state = tx.update(grads, state, params, value=jnp.array([0.5, 1.5]))
      >>> print(updates["w"], cabs_jax.batch_size(state))
      [-0.2 -0.1] 16
    """
    if not callable(rule):
        raise TypeError(
            f"rule must be a function of Statistics, such as rules.cabs(learning_rate), got "
            f"{rule!r}."
        )
    check_number("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    legal = legal_sizes(min_batch_size, max_batch_size, round_to)
    first = check_initial_batch_size(initial_batch_size, legal)

    def init(params: PyTree) -> AdaptBatchSizeState:
        del params
        zero = jnp.zeros((), jnp.float32)
        flag = jnp.zeros((), jnp.int32)
        return AdaptBatchSizeState(
            step=flag,
            batch_size=nearest_legal_size(jnp.asarray(first, jnp.float32), legal),
            value_average=zero if debias else jnp.ones((), jnp.float32),
            gradient_variance_average=zero,
            squared_gradient_norm_average=zero,
            weight=zero,
            info=Info(jnp.asarray(first, jnp.float32), zero, zero, zero, flag, flag),
        )

    def update(
        updates: PyTree,
        state: AdaptBatchSizeState,
        params: PyTree = None,
        *,
        value: Any = None,
        gradient_variance: PyTree = None,
        count: Any = None,
        mask: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AdaptBatchSizeState]:
        del extra_args
        moments = read_moments(updates, params, value, gradient_variance, count, mask, axis_name)
        new_state = _advance(state, moments, rule, legal, decay, debias)
        return unless_empty(moments.count, moments.mean, new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _advance(
    state: AdaptBatchSizeState,
    moments: StepMoments,
    rule: Rule,
    legal: LegalSizes,
    decay: ArrayLike,
    debias: bool,
) -> AdaptBatchSizeState:
    """Returns the state after a step that had examples."""
    decay = jnp.asarray(decay, jnp.float32)

    def average(old: jax.Array, new: ArrayLike) -> jax.Array:
        return decay * old + (1 - decay) * new

    value, variance, count = moments.value, moments.gradient_variance, moments.count
    biased_norm = tree_squared_norm(moments.mean)
    weight = average(state.weight, 1.0)
    value_average = average(state.value_average, value)
    variance_average = average(state.gradient_variance_average, variance)
    norm_average = state.squared_gradient_norm_average
    if count is not None:
        norm_average = average(
            norm_average, biased_norm - rules.noise_in_squared_norm(variance, count)
        )

    total = weight if debias else jnp.ones((), jnp.float32)
    raw = jnp.asarray(
        rule(
            Statistics(
                value=value_average / total,
                gradient_variance=variance_average / total,
                squared_gradient_norm=None if count is None else norm_average / total,
                count=count,
                step=state.step,
                batch_size=state.batch_size,
            )
        ),
        jnp.float32,
    )
    if raw.shape != ():
        raise ValueError(f"the rule must return a scalar, got an array of shape {raw.shape}.")

    answered = ~jnp.isnan(raw)
    info = Info(
        raw_batch_size=raw,
        value=value,
        gradient_variance=variance,
        mean_gradient_squared_norm=biased_norm,
        bound=_bound(raw, legal),
        non_finite=jnp.asarray(~answered, jnp.int32),
    )
    adapted = AdaptBatchSizeState(
        step=optax.safe_increment(state.step),
        batch_size=jnp.where(answered, nearest_legal_size(raw, legal), state.batch_size),
        value_average=value_average,
        gradient_variance_average=variance_average,
        squared_gradient_norm_average=norm_average,
        weight=weight,
        info=info,
    )
    untouched = state._replace(
        step=adapted.step,
        info=info._replace(
            raw_batch_size=state.info.raw_batch_size,
            bound=state.info.bound,
            non_finite=jnp.ones((), jnp.int32),
        ),
    )
    finite = jnp.isfinite(value) & jnp.isfinite(variance) & jnp.isfinite(biased_norm)
    selected: AdaptBatchSizeState = select(finite, adapted, untouched)
    return selected


def _bound(raw: jax.Array, legal: LegalSizes) -> jax.Array:
    below = raw < jnp.asarray(legal.minimum, jnp.float32)
    above = raw > jnp.asarray(legal.maximum, jnp.float32)
    return above.astype(jnp.int32) - below.astype(jnp.int32)


def unless_empty(
    count: jax.Array | None, updates: PyTree, new_state: PyTree, old_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the updates and the new state, or zeros and the old one if `count` is 0."""
    if count is None:
        return updates, new_state
    nothing = (jax.tree.map(jnp.zeros_like, updates), old_state)
    kept_updates, kept_state = select(count > 0, (updates, new_state), nothing)
    return kept_updates, kept_state


def select(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Returns one of two trees of equal structure, by a boolean scalar."""
    return jax.tree.map(partial(jnp.where, condition), if_true, if_false)
