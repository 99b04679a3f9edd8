"""What the transformation remembers between steps: a few scalars, whatever the model's size."""

from typing import Any, NamedTuple

import jax

from cabs_jax.noise_scale import NoiseScale
from cabs_jax.progress import ExampleCount, Progress
from cabs_jax.statistics import PyTree


class Info(NamedTuple):
    """What one wants to plot of the last step, and the algorithm does not need.

    Attributes:
      raw_batch_size: What the rule asked for, before rounding and bounds; float32, may be infinite.
      value: Mean loss F of the step's batch, float32; 0 where `update` was given none.
      gradient_variance: Trace ξ of the gradient covariance of the step's batch, float32; 0
        likewise.
      mean_gradient_squared_norm: ‖ḡ‖² of the step's mean gradient, noise included, float32.
      squared_gradient_norm: Running average of ‖ḡ‖² − ξ/(m − 1), the unbiased estimate of ‖∇F‖²,
        float32; not positive where noise hides it.
      noise_scale: V/‖∇F‖², the size at which a batch holds as much noise as gradient; a ratio of
        two running averages, V = ξ·m/(m − 1) being the unbiased trace; float32. Infinite where the
        estimate of ‖∇F‖² is not positive, and before the first batch of known `count`.
      noise_scale_low: Lower end of its 95 % interval (Fieller's), float32.
      noise_scale_high: Upper end, float32; infinite while ‖∇F‖² cannot be told from 0.
      gradient_scale: s where what stands before in the chain, such as clipping, has made s·ḡ of the
        gradient ḡ in `moments`, float32; 1 where `update` was not given `moments`.
      altered: 1 where it has made something else of it, as `MultiSteps`, signs and projections do,
        else 0; int32. The rule then goes by the s of the steps before, and its size is a guess.
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
    squared_gradient_norm: jax.Array
    noise_scale: jax.Array
    noise_scale_low: jax.Array
    noise_scale_high: jax.Array
    gradient_scale: jax.Array
    altered: jax.Array
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
      gradient_scale_average: Running average of `info.gradient_scale`, float32.
      weight: How much of an average that started at 0 comes from the n steps averaged so far,
        1 − decay^n, float32; `debias` divides by it.
      unrounded_batch_size: What the rule answered last, within the bounds but not rounded, float32;
        above `max_batch_size` only where a smaller learning rate stands in for the rest.
      examples: Exact number of examples seen; it stands still where `update` is given no `count`.
      progress: Averages of the loss from which F − F* is estimated.
      noise_scale: Averages from which the noise scale is estimated.
      info: What one wants to plot of the last step.
    """

    step: jax.Array
    batch_size: jax.Array
    value_average: jax.Array
    gradient_variance_average: jax.Array
    squared_gradient_norm_average: jax.Array
    gradient_scale_average: jax.Array
    weight: jax.Array
    unrounded_batch_size: jax.Array
    examples: ExampleCount
    progress: Progress
    noise_scale: NoiseScale
    info: Info


class CoupledState(NamedTuple):
    """State of `cabs_adam`, and of `cabs` with momentum.

    Attributes:
      adapt: That of the batch size.
      direction: That of the optax transformations from the mean gradient to the direction.
    """

    adapt: AdaptBatchSizeState
    direction: PyTree


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      measured: What `adapt_batch_size` would remember; its batch size is not asked for.
    """

    measured: AdaptBatchSizeState


def batch_size(state: PyTree) -> jax.Array:
    """Finds the next batch size in an optimizer state, however deep it is wrapped.

    Args:
      state: State of an optax optimizer that holds `cabs` or `adapt_batch_size` exactly once: in
        `chain`, `inject_hyperparams`, `masked`, `partition`, `apply_if_finite`, or any other tree,
        `nnx.Optimizer` among them.

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
    return _array(adapt_state(state).batch_size)


def adapt_state(state: PyTree) -> AdaptBatchSizeState:
    """Finds the state of `adapt_batch_size` where `batch_size` does, or raises what it does."""
    adapts = [node for node in _ours(state) if isinstance(node, AdaptBatchSizeState)]
    found: AdaptBatchSizeState = _only(adapts, state, "batch size", "cabs_jax.adapt_batch_size")
    return found


def info(state: PyTree) -> Info:
    """Finds what was measured of the last step in an optimizer state, however deep it is wrapped.

    Args:
      state: State of an optax optimizer that holds `cabs`, `cabs_adam`, `adapt_batch_size` or
        `monitor` exactly once.

    Returns:
      The measurements, all scalars: `float(x)` and `x.item()` take them to the host, and
      `info(state)._asdict()` is what a logger wants.

    Raises:
      ValueError: If the state holds none, or more than one.

    >>> import cabs_jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), cabs_jax.cabs_adam(1e-3))
    >>> print(info(tx.init({"w": jnp.zeros(3)})).raw_batch_size)
    16.0
    """
    measured = [n.measured if isinstance(n, MonitorState) else n for n in _ours(state)]
    found: Info = _only(measured, state, "measurement", "cabs_jax.monitor").info
    return Info(*map(_array, found))


def _is_ours(node: PyTree) -> bool:
    return isinstance(node, (AdaptBatchSizeState, MonitorState))


def _ours(state: PyTree) -> list[Any]:
    return [node for node in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(node)]


def _array(x: PyTree) -> jax.Array:
    """What a field holds, which flax nnx may have made a variable of."""
    (array,) = jax.tree.leaves(x)
    return array  # type: ignore[no-any-return]


def _only(found: list[Any], state: PyTree, what: str, or_what: str) -> Any:
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"no {what} in this state of type {type(state).__name__}: it must come from `init` "
            f"or `update` of an optimizer that holds cabs_jax.cabs or {or_what} "
            "(a restored checkpoint: restore it into the tree that `init` returns)."
        )
    raise ValueError(
        f"{len(found)} {what}s in this state of type {type(state).__name__}: pass the part of "
        "it that belongs to one of them."
    )
