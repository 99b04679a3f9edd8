"""A meter: measures along any run, and changes nothing."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from cabs_jax import rules
from cabs_jax._arguments import INT32_MAX
from cabs_jax.rules import Rule
from cabs_jax.sizing import select, sizing
from cabs_jax.state import MonitorState
from cabs_jax.statistics import GradientMoments, PyTree
from cabs_jax.step_moments import check_moments, read_moments


def monitor(
    decay: ArrayLike = 0.95, *, rule: Rule | None = None
) -> optax.GradientTransformationExtraArgs:
    """Measures loss, gradient variance and noise scale along a run that it does not change.

    Chain it with any optimizer, anywhere, and pass `moments=` to `update`; `info(state)` then
    gives the measurements of the last step and their running averages. The updates go through as
    they are: only `moments` is looked at, which may come from another function than the gradient,
    and `params` may be left out. A step without `moments` leaves the measurements alone, so that
    measuring every tenth step costs a tenth.

    Args:
      decay: Constant of the running averages, in [0, 1), over the steps with `moments`. They start
        from the first measurement.
      rule: What `info(state).raw_batch_size` should answer: `rules.cabs(learning_rate)` for the
        size that CABS would take; `rules.noise_scale()` by default.

    Returns:
      An optax transformation with a `MonitorState`, in which `batch_size` finds nothing.

    Raises:
      TypeError: If rule is not callable.
      ValueError: If decay is out of range.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp, optax
      >>> x = 1.0 + jax.random.normal(jax.random.key(0), (64, 8))  # variance 1, a mean 1 away
      >>> loss_fn = lambda w, row: 0.5 * jnp.sum((w - row) ** 2)
      >>> moments_fn = jax.jit(cabs_jax.gradient_moments(loss_fn))
      >>> tx = optax.chain(cabs_jax.monitor(), optax.adam(1e-3))
      >>> params = jnp.zeros(8)
      >>> state = tx.init(params)
      >>> m = moments_fn(params, x)
      >>> updates, state = tx.update(m.mean, state, params, moments=m)
      >>> print(0.8 < cabs_jax.info(state).noise_scale < 1.25)
      True
    """
    meter = sizing(
        rules.noise_scale() if rule is None else rule,
        min_batch_size=1,
        max_batch_size=INT32_MAX,
        decay=decay,
        debias=True,
        initial_batch_size=None,
        round_to=1,
    )

    def init(params: PyTree) -> MonitorState:
        del params
        return MonitorState(meter.initial_state())

    def update(
        updates: PyTree,
        state: MonitorState,
        params: PyTree = None,
        *,
        moments: GradientMoments | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, MonitorState]:
        del params, extra_args
        before = state.measured
        if moments is None:
            return updates, MonitorState(before._replace(step=optax.safe_increment(before.step)))
        check_moments(moments)
        read = read_moments(moments.mean, moments.mean, None, moments=moments)
        return updates, MonitorState(select(moments.count > 0, meter.advance(before, read), before))

    return optax.GradientTransformationExtraArgs(init, update)
