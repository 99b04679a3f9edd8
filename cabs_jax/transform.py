"""The optax transformation that averages the gradient and tracks the batch size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import optax
from jax.typing import ArrayLike

from cabs_jax.rounding import RoundTo
from cabs_jax.rules import Rule
from cabs_jax.sizing import Sizing, sizing, unless_empty
from cabs_jax.state import AdaptBatchSizeState
from cabs_jax.statistics import PyTree
from cabs_jax.step_moments import read_moments


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
    `cabs_jax.rules` that needs the squared norm of the gradient needs `count` on path (b), and one
    that needs neither loss nor variance does with the mean gradient alone.

    Within optax:

    * `chain`: first on path (a), since what follows expects mean gradients. On path (b) with
      `moments`, after clipping too: where that has made s·ḡ of the gradient, the rule takes the
      step for one of s·α, and norms as measured. `info(state).altered` says where something else
      has become of it. Adaptive steps and momentum follow it.
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
      decay: Constant of the running averages, in [0, 1). An average that exceeds
        max(|x|, 1) more than 2³² times, x being the step's measurement, starts anew from x: it
        holds a measurement that went wrong, and would for hundreds of steps.
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
    return transformation(
        sizing(
            rule,
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            decay=decay,
            debias=debias,
            initial_batch_size=initial_batch_size,
            round_to=round_to,
        ),
        axis_name,
    )


def transformation(
    rule_to_size: Sizing, axis_name: Hashable | None
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that averages the gradient and tracks the batch size."""

    def init(params: PyTree) -> AdaptBatchSizeState:
        del params
        return rule_to_size.initial_state()

    def update(
        updates: PyTree, state: AdaptBatchSizeState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, AdaptBatchSizeState]:
        moments = read_moments(updates, params, axis_name, **extra_args)
        new_state = rule_to_size.advance(state, moments)
        return unless_empty(moments.count, moments.mean, new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)
