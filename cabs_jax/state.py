"""What the transformation remembers between steps: a few scalars, whatever the model's size."""

from typing import NamedTuple

import jax

from cabs_jax.progress import ExampleCount, Progress
from cabs_jax.statistics import PyTree


class Info(NamedTuple):
    """What one wants to plot of the last step, and the algorithm does not need.

    Attributes:
      raw_batch_size: What the rule asked for, before rounding and bounds; float32, may be infinite.
      value: Mean loss F of the step's batch, float32.
      gradient_variance: Trace ξ of the gradient covariance of the step's batch, float32.
      mean_gradient_squared_norm: ‖ḡ‖² of the step's mean gradient, noise included, float32.
      bound: −1 where the raw size lies below `min_batch_size`, 1 where it lies above
        `max_batch_size`, 0 where it lies between; int32.
      learning_rate_scale: Factor on the step's learning rate, float32; below 1 where a smaller step
        stands in for a batch beyond `max_batch_size`.
      non_finite: 1 where loss, gradient or the rule's answer was not finite, so that the batch size
        stayed as it was, else 0; int32. An infinite answer is a legal one and not flagged.
    """

    raw_batch_size: jax.Array
    value: jax.Array
    gradient_variance: jax.Array
    mean_gradient_squared_norm: jax.Array
    bound: jax.Array
    learning_rate_scale: jax.Array
    non_finite: jax.Array


class AdaptBatchSizeState(NamedTuple):
    """State of `adapt_batch_size` and of plain `cabs`: scalars in float32 and int32.

    Attributes:
      step: Number of steps made, empty batches left out, int32.
      batch_size: Size of the next batch, int32; always legal and within the bounds.
      value_average: Running average of the loss, float32.
      gradient_variance_average: Running average of ξ, float32.
      squared_gradient_norm_average: Running average of ‖ḡ‖² − ξ/(m − 1), float32.
      weight: How much of an average that started at 0 comes from the n steps averaged so far,
        1 − decay^n, float32; `debias` divides by it.
      unrounded_batch_size: What the rule answered last, within the bounds but not rounded, float32;
        above `max_batch_size` only where a smaller learning rate stands in for the rest.
      examples: Exact number of examples seen; it stands still where `update` is given no `count`.
      progress: Averages of the loss from which F − F* is estimated.
      info: What one wants to plot of the last step.
    """

    step: jax.Array
    batch_size: jax.Array
    value_average: jax.Array
    gradient_variance_average: jax.Array
    squared_gradient_norm_average: jax.Array
    weight: jax.Array
    unrounded_batch_size: jax.Array
    examples: ExampleCount
    progress: Progress
    info: Info


class CoupledState(NamedTuple):
    """State of `cabs_adam`, and of `cabs` with momentum.

    Attributes:
      adapt: That of the batch size.
      direction: That of the optax transformations from the mean gradient to the direction.
    """

    adapt: AdaptBatchSizeState
    direction: PyTree


def batch_size(state: PyTree) -> jax.Array:
    """Finds the next batch size in an optimizer state, however deep it is wrapped.

    Args:
      state: State of an optax optimizer that holds `cabs` or `adapt_batch_size` exactly once: in
        `chain`, `inject_hyperparams`, `masked`, `partition`, `apply_if_finite`, or any other tree.

    Returns:
      Number of examples of the next batch, an int32 scalar; under `vmap`, or of a stacked state,
      an array with the leading axes of the state.

    Raises:
      ValueError: If the state holds none, or more than one.

    >>> import cabs_jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(cabs_jax.cabs(0.1), optax.add_decayed_weights(1e-4))
    >>> print(batch_size(tx.init({"w": jnp.zeros(3)})))
    16
    """

    def is_ours(node: PyTree) -> bool:
        return isinstance(node, AdaptBatchSizeState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) == 1:
        size: jax.Array = found[0].batch_size
        return size
    if not found:
        raise ValueError(
            f"no batch size in this state of type {type(state).__name__}: it must come from `init` "
            "or `update` of an optimizer that holds cabs_jax.cabs or cabs_jax.adapt_batch_size "
            "(a restored checkpoint: restore it into the tree that `init` returns)."
        )
    raise ValueError(
        f"{len(found)} batch sizes in this state of type {type(state).__name__}: pass the part of "
        "it that belongs to one of them."
    )
