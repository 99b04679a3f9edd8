"""One step of training: gradient moments, the optimizer and the next batch size."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

import cabs_jax
from experiments.training import methods


class StepInfo(NamedTuple):
    """Scalars of one step: this batch's statistics and the size that the next should have."""

    loss: jax.Array
    gradient_variance: jax.Array
    learning_rate: jax.Array
    next_batch_size: jax.Array


def make_train_step(
    loss: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    variance: Literal["trace", "diagonal"] = "trace",
    gated: bool = False,
) -> Callable[..., tuple[Any, Any, StepInfo]]:
    """`train_step(params, opt_state, batch, mask=None) -> (params, opt_state, StepInfo)`.

    Args:
      loss: Maps (params, example) to a scalar.
      optimizer: As `methods.build` makes them.
      variance: What the optimizer needs to know, as `methods.variance` says. The metrics
        get the trace in either case.
      gated: Whether the optimizer asks for the loss of its exponentially averaged weights.
    """
    moments_of = cabs_jax.gradient_moments(loss, variance=variance)
    update = make_update(optimizer)

    def train_step(
        params: Any, opt_state: Any, batch: Any, mask: Any = None
    ) -> tuple[Any, Any, StepInfo]:
        averaged = opt_state.exponential if gated else None
        return update(params, opt_state, moments_of(params, batch, mask, averaged_params=averaged))

    return train_step


def make_update(
    optimizer: optax.GradientTransformationExtraArgs,
) -> Callable[[Any, Any, cabs_jax.GradientMoments], tuple[Any, Any, StepInfo]]:
    """`update(params, opt_state, moments) -> (params, opt_state, StepInfo)`."""

    def update(
        params: Any, opt_state: Any, moments: cabs_jax.GradientMoments
    ) -> tuple[Any, Any, StepInfo]:
        updates, opt_state = optimizer.update(moments.mean, opt_state, params, moments=moments)
        info = StepInfo(
            loss=moments.value,
            gradient_variance=optax.tree.sum(moments.variance),
            learning_rate=methods.learning_rate(opt_state),
            next_batch_size=cabs_jax.batch_size(opt_state),
        )
        return optax.apply_updates(params, updates), opt_state, info

    return update
