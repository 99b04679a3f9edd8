"""What is measured on a batch and averaged over steps, in float32 whatever the model's dtype."""

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

PyTree = Any
Variance = Literal["trace", "by_parameter", "diagonal"]
LANES = 16
ABSURD = 2.0**32  # ratio of an average to a measurement beyond which it averages no such thing


class WeightSums(NamedTuple):
    """What merging needs to know of the weights w_i of a batch, for real examples.

    Attributes:
      total: Σ w_i, float32 scalar.
      squares: Σ w_i², float32 scalar.
      square_mean: Σ w_i² g_i / Σ w_i², a float32 tree like the parameters; None where the method
        does not measure it ("between").
    """

    total: jax.Array
    squares: jax.Array
    square_mean: PyTree


class GradientMoments(NamedTuple):
    """What one batch says about the loss and its gradient; `gradient_moments` gives it.

    Attributes:
      value: Mean loss of the batch, float32 scalar.
      mean: Mean gradient, a tree like the parameters, in their dtypes.
      variance: Trace of the gradient covariance (1/m) Σ_i ‖g_i‖² − ‖ḡ‖², float32 scalar ≥ 0;
        or, where it was asked for by parameter, a tree like the parameters of such scalars; or,
        where the diagonal was asked for, a float32 tree like the parameters of (1/m) Σ_i g_i² − ḡ².
      count: Number m of real (unmasked) examples, int32 scalar.
      averaged_value: Mean loss of averaged weights on the same batch, float32 scalar; None where
        it was not asked for.
      weights: Sums over the weights of the examples, None where there were none. With them the
        means are weighted, count is the effective size (Σ w_i)²/Σ w_i², rounded, and the variance
        Σ_i w_i²‖g_i − ḡ‖²/Σ w_i² that of one example of it.

    Example:
      >>> losses, grads = jnp.array([0.5, 1.5]), {"w": jnp.array([[3.0, 0.0], [1.0, 2.0]])}
      >>> m = moments_from_per_example(losses, grads)
      >>> float(m.value), m.mean["w"].tolist(), float(m.variance), int(m.count)
      (1.0, [2.0, 1.0], 2.0, 2)
    """

    value: jax.Array
    mean: PyTree
    variance: PyTree
    count: jax.Array  # type: ignore[assignment]  # tuple.count is not missed
    averaged_value: jax.Array | None = None
    weights: WeightSums | None = None


class Statistics(NamedTuple):
    """What a rule may look at, after a step.

    Attributes:
      value: Running average of the loss F, float32 scalar; None where `update` was given no loss.
      gradient_variance: Running average of the trace ξ of the gradient covariance, float32 scalar;
        None where `update` was given neither per-example gradients nor their variance.
      squared_gradient_norm: Running average of ‖ḡ‖² − ξ/(m − 1), the unbiased estimate of ‖∇F‖²,
        which noise can make negative; float32 scalar. None where `update` was given no `count` or
        no variance.
      count: Number m of real examples of this step's batch, int32 scalar, or None likewise.
      step: Index of this step, from 0, int32 scalar.
      batch_size: Batch size that was asked for this step, int32 scalar.
      estimated_gap: Estimate of F − F* from the progress of the loss, float32 scalar, not positive
        where the loss does not fall; None where `update` was given no `count`.
      averaged_excess: Running average of F(w) − F(w̄), w̄ being averaged weights, float32 scalar;
        None where `update` was given no `averaged_value`.
      raw_batch_size: What the rule answered after the step before, not rounded but within the
        bounds, float32 scalar: where a rule that moves gradually starts from.
      examples: Number of examples seen, this step's included, float32 scalar, rounded from an exact
        count; None where `update` was given no `count`.
      gradient_scale: Running average of s, where what stands before has made s·ḡ of the gradient
        ḡ that was measured, float32 scalar: a step of α along it is one of s·α along ḡ.
    """

    value: jax.Array | None
    gradient_variance: jax.Array | None
    squared_gradient_norm: jax.Array | None
    count: jax.Array | None  # type: ignore[assignment]
    step: jax.Array
    batch_size: jax.Array
    estimated_gap: jax.Array | None = None
    averaged_excess: jax.Array | None = None
    raw_batch_size: jax.Array | None = None
    examples: jax.Array | None = None
    gradient_scale: jax.Array | float = 1.0


Rule = Callable[[Statistics], ArrayLike]

_LOST = (
    " flax's TrainState.apply_gradients passes nothing on: write updates, opt_state = state.tx."
    "update(m.mean, state.opt_state, state.params, moments=m), and state.replace(step=state.step + "
    "1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)."
)


def measured(x: jax.Array | None, name: Literal["value", "gradient_variance"]) -> jax.Array:
    """Returns what was measured.

    Raises:
      ValueError: If `update` was given no such thing.
    """
    if x is not None:
        return x
    if name == "value":
        raise ValueError(
            "update got value=None: pass moments=, what gradient_moments returned, or value=, the "
            "per-example losses or their mean." + _LOST
        )
    raise ValueError(
        "update got gradient_variance=None, and gradients of the shapes of the parameters, which "
        "are mean gradients: pass moments=, what gradient_moments returned, or gradient_variance="
        "; or per-example gradients in place of their mean." + _LOST
    )


def effective_size(total: jax.Array, squares: jax.Array) -> jax.Array:
    """Returns the effective size (Σ w_i)²/Σ w_i² of a batch, rounded, an int32 scalar.

    >>> effective_size(jnp.float32(8), jnp.float32(16)).item()
    4
    """
    size = total * (total / jnp.where(squares == 0, 1, squares))
    return jnp.round(size).astype(jnp.int32)


def is_absurd(average: jax.Array, measured: jax.Array) -> jax.Array:
    """Returns whether an average is so far from what is measured that it must be forgotten."""
    return jnp.abs(average) > ABSURD * jnp.maximum(jnp.abs(measured), 1)


def tree_squared_norm(tree: PyTree) -> jax.Array:
    """Returns Σ x² over all entries of a tree of arrays, accumulated in float32.

    >>> float(tree_squared_norm({"w": jnp.array([3.0, 4.0])}))
    25.0
    """
    norms = (squared_norms(leaf, 0) for leaf in jax.tree.leaves(tree))
    return sum(norms, start=jnp.zeros((), jnp.float32))


def squared_norms(x: jax.Array, lead: int) -> jax.Array:
    """Returns Σ x² over all axes but the first `lead`, accumulated in float32.

    >>> squared_norms(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 1).tolist()
    [25.0, 1.0]
    """
    x, summed = x.astype(jnp.float32), tuple(range(lead, x.ndim))
    if not summed or x.shape[-1] % LANES or jax.typeof(x).sharding.spec[-1] is not None:
        return jnp.sum(jnp.square(x), axis=summed)
    # As products of short rows: on CPU XLA would write the squares to memory, and adds up the
    # product of two long vectors in sequence, which costs three digits. Where shards are narrower
    # than a row, which an Auto mesh does not show, they send each other sums, one of 16 numbers.
    rows = x.reshape(*x.shape[:-1], x.shape[-1] // LANES, LANES)
    batch, contracted = tuple(range(x.ndim)), (x.ndim,)
    numbers = ((contracted, contracted), (batch, batch))
    products = jax.lax.dot_general(rows, rows, numbers, jax.lax.Precision.HIGHEST)
    return jnp.sum(products, axis=summed)


def tree_dot(tree: PyTree, other: PyTree) -> jax.Array:
    """Returns Σ x·y over all entries of two trees of arrays, accumulated in float32."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))

    dots = map(dot, jax.tree.leaves(tree), jax.tree.leaves(other))
    return sum(dots, start=jnp.zeros((), jnp.float32))


def tree_sum(tree: PyTree) -> jax.Array:
    """Returns the sum of all entries of a tree of float32 arrays, a float32 scalar."""
    return sum(map(jnp.sum, jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def sum_entries(tree: PyTree, variance: Variance) -> PyTree:
    """Sums squares as the kind of variance sums them: all, those of each leaf, or none."""
    if variance == "trace":
        return tree_sum(tree)
    return tree if variance == "diagonal" else jax.tree.map(jnp.sum, tree)


def squares_of(tree: PyTree, variance: Variance) -> PyTree:
    """Returns the squares of a tree's entries, summed as the kind of variance sums them."""
    if variance == "trace":
        return tree_squared_norm(tree)
    return jax.tree.map(jnp.square if variance == "diagonal" else tree_squared_norm, tree)


def noise_in_squared_norm(variance: jax.Array, count: jax.Array) -> jax.Array:
    """Returns ξ/(m − 1), by which ‖ḡ‖² overestimates ‖∇F‖²; float32 scalar.

    Of a single example ξ is 0 and its noise unknown: the answer is then 0.
    """
    return variance / jnp.maximum(jnp.asarray(count, jnp.float32) - 1, 1)


def sum_over(tree: PyTree, axis_name: Hashable | None) -> PyTree:
    """Sums a tree over a mapped axis; without one it is returned as it is."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def moments_from_per_example(
    losses: jax.Array,
    grads: PyTree,
    mask: jax.Array | None = None,
    *,
    variance: Variance = "trace",
    axis_name: Hashable | None = None,
) -> GradientMoments:
    """Reduces per-example losses and gradients to their moments.

    The variance is (1/m) Σ_i (g_i − ḡ)², summed over entries for the trace: two passes, since the
    textbook form (1/m) Σ_i g_i² − ḡ² cancels in float32.

    Args:
      losses: Per-example losses, shape (m,).
      grads: Per-example gradients: a tree like the parameters with a leading example axis.
      mask: Boolean, shape (m,); False marks padding, which has no influence, whatever it holds.
      variance: "trace" for a scalar, "by_parameter" for a tree of scalars, "diagonal" for a tree
        like the parameters.
      axis_name: Mapped axis or axes over which the batch is split, if any.

    Returns:
      The moments of the whole batch (over all of `axis_name`); zeros if every example is masked.
    """
    size = losses.shape[0]
    keep = jnp.ones((size,), jnp.bool_) if mask is None else mask

    def example_sum(x: jax.Array) -> jax.Array:
        selected = jnp.where(_align(keep, x), x, jnp.zeros((), x.dtype))
        return jnp.sum(selected, axis=0, dtype=jnp.float32)

    counted = jnp.full((), size, jnp.int32) if mask is None else jnp.sum(mask, dtype=jnp.int32)
    count = sum_over(counted, axis_name)
    share = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)  # of each example
    value, mean = jax.tree.map(
        lambda total: total * share,
        sum_over((example_sum(losses), jax.tree.map(example_sum, grads)), axis_name),
    )

    def centred_squares(g: jax.Array, centre: jax.Array) -> jax.Array:
        return jnp.square(g.astype(jnp.float32) - centre[None])

    squares = jax.tree.map(centred_squares, grads, mean)
    if variance != "diagonal":  # entries first: a scalar for each example, wherever it lives
        squares = jax.tree.map(lambda s: jnp.sum(s, axis=tuple(range(1, s.ndim))), squares)
    if variance == "trace":
        squares = sum(jax.tree.leaves(squares), start=jnp.zeros((size,), jnp.float32))
    spread = sum_over(jax.tree.map(example_sum, squares), axis_name)
    spread = jax.tree.map(lambda total: total * share, spread)
    mean = jax.tree.map(lambda centre, g: centre.astype(g.dtype), mean, grads)
    return GradientMoments(value, mean, spread, count)


def _align(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - 1))
