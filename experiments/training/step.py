"""One step of training: gradient moments, the optimizer and the next batch size."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments.training import methods


class StepInfo(NamedTuple):
    """Scalars of one step: this batch's statistics and the size that the next should have."""

    loss: jax.Array
    gradient_variance: jax.Array
    learning_rate: jax.Array
    next_batch_size: jax.Array


def mean_loss(loss: Callable[[PyTree, PyTree], jax.Array]) -> Callable[..., jax.Array]:
    """`mean(params, batch, mask=None)`, the mean of the examples' losses that training descends.

    Args:
      loss: Maps (params, example) to a scalar.
    """

    def mean(params: PyTree, batch: PyTree, mask: jax.Array | None = None) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0))(params, batch), where=mask)

    return mean


def make_train_step(
    loss: Callable[[PyTree, PyTree], jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    variance: Literal["trace", "diagonal"] = "trace",
    gated: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, StepInfo]]:
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
        params: PyTree, opt_state: PyTree, batch: PyTree, mask: jax.Array | None = None
    ) -> tuple[PyTree, PyTree, StepInfo]:
        averaged = opt_state.exponential if gated else None
        return update(params, opt_state, moments_of(params, batch, mask, averaged_params=averaged))

    return train_step


def make_update(
    optimizer: optax.GradientTransformationExtraArgs,
) -> Callable[[PyTree, PyTree, cabs_jax.GradientMoments], tuple[PyTree, PyTree, StepInfo]]:
    """`update(params, opt_state, moments) -> (params, opt_state, StepInfo)`."""

    def update(
        params: PyTree, opt_state: PyTree, moments: cabs_jax.GradientMoments
    ) -> tuple[PyTree, PyTree, StepInfo]:
        updates, opt_state = optimizer.update(moments.mean, opt_state, params, moments=moments)
        info = StepInfo(
            loss=moments.value,
            gradient_variance=optax.tree.sum(moments.variance),
            learning_rate=methods.learning_rate(opt_state),
            next_batch_size=cabs_jax.batch_size(opt_state),
        )
        return optax.apply_updates(params, updates), opt_state, info

    return update
