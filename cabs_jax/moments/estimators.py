"""The methods: each turns one block of the batch into sums.

An estimator is a function `(task, params, batch, keep, shares) -> (sums, aux)`. `shares`, shape
(block,), are the parts s_i that the examples have in the mean, 1/m or w_i/Σw: they go in where the
backward pass starts, so that what comes out is the mean gradient and need not be touched again.
`keep`, boolean of shape (block,), is False for padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import split
from cabs_jax.moments.factored.batch_sums import batch_losses, batch_sums
from cabs_jax.moments.factored.values import Sample
from cabs_jax.moments.parameters import LossAndAux
from cabs_jax.moments.per_example import batch_size_of, per_example_value_and_grad
from cabs_jax.moments.shards import Layout, Layouts
from cabs_jax.moments.target import Target
from cabs_jax.statistics import PyTree, Variance, sum_entries, sum_over


class Sums(NamedTuple):
    """What is added up over blocks and devices, each example with its share s_i.

    Attributes:
      value: Σ s_i ℓ_i.
      gradient: Σ s_i g_i, float32.
      squares: Σ ‖s_i g_i‖², or of each parameter's part, or of the entries' squares; between groups
        of n_k examples, or with weights of shares n_k, Σ_k ‖Σ_i s_i g_i‖²/n_k.
      shift: Part of Σ s_i g_i that is the same for every example and not in `gradient`, or ().
      square_mean: With weights, Σ s_i² g_i, where the method needs it; or ().
      groups: Between groups, the number of those that are not empty; or ().
      square_shares: Between groups, with weights, Σ_k (Σ_i s_i²)/n_k; or ().
    """

    value: jax.Array
    gradient: PyTree
    squares: PyTree
    shift: PyTree = ()
    square_mean: PyTree = ()
    groups: PyTree = ()
    square_shares: PyTree = ()


def sum_over_devices(
    sums: Sums,
    variance: Variance,
    layouts: Layouts,
    axis_names: tuple[str, ...],
    reduce_dtype: Any,
) -> Sums:
    """Adds up sums, those of parts over the axes that they have not been added up over.

    Gradients are added up in `reduce_dtype`, everything else in float32, as they are for None.
    """
    if not any(layouts) and reduce_dtype is None:
        everywhere: Sums = sum_over(sums, axis_names or None)
        return everywhere
    of_entries = {"gradient", "shift", "square_mean"}
    of_entries |= {"squares"} if variance == "diagonal" else set()

    def total(leaf: jax.Array, layout: Layout | None, dtype: Any) -> jax.Array:
        rest = tuple(n for n in axis_names if layout is None or n not in layout.names)
        summed: jax.Array = lax.psum(leaf.astype(dtype), rest) if rest else leaf
        return summed.astype(leaf.dtype)

    def of_field(name: str, tree: PyTree) -> PyTree:
        treedef: Any  # its stub has no methods
        leaves, treedef = jax.tree.flatten(tree)
        known = layouts if name in of_entries and leaves and layouts else (None,) * len(leaves)
        narrowed = name in {"gradient", "shift"} and reduce_dtype is not None
        dtypes = [reduce_dtype if narrowed else leaf.dtype for leaf in leaves]
        return treedef.unflatten(map(total, leaves, known, dtypes))

    return type(sums)(*map(of_field, sums._fields, sums))


class Task(NamedTuple):
    """What is to be summed up.

    Attributes:
      loss_fn: `loss_fn(params, example) -> (loss, aux)`.
      variance: "trace", "by_parameter" or "diagonal".
      axis_names: Mesh axes that split the batch, inside a shard_map.
      target: The machine, and how the batch lies on it.
      weighted: Whether the shares of the examples may differ.
      layouts: How each parameter lies on the devices; () where all are whole.
      coupled: Whether `loss_fn` takes all examples of a block at once, as one group.
    """

    loss_fn: LossAndAux
    variance: Variance
    axis_names: tuple[str, ...]
    target: Target
    weighted: bool = False
    coupled: bool = False
    layouts: Layouts = ()


def averaged_losses(
    task: Task, averaged_params: PyTree, batch: PyTree, layouts: Layouts
) -> jax.Array:
    """Losses (m,) of averaged parameters, which may lie on the devices in their own way."""
    if not any(layouts):
        return losses_of(task, averaged_params, batch)[0]
    sample = Sample(batch_size_of(batch), task.axis_names, task.target)
    return batch_losses(task.loss_fn, averaged_params, batch, sample, layouts)


def losses_of(task: Task, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
    """Losses (m,) of the examples of a block, their own or that of their group, and aux."""
    if not task.coupled:
        losses: tuple[jax.Array, PyTree] = task.target.vmap(task.loss_fn, (None, 0))(params, batch)
        return losses
    loss, aux = task.loss_fn(params, batch)
    of_group = jax.tree.map(lambda a: jnp.asarray(a)[None], aux)
    return jnp.broadcast_to(loss, (batch_size_of(batch),)), of_group


def factored(
    task: Task, params: PyTree, batch: PyTree, keep: jax.Array, shares: jax.Array
) -> tuple[Sums, PyTree]:
    """Squares of the gradients of examples, from the inputs and cotangents of the layers."""
    weights = jnp.where(keep, shares, 0.0)
    sample = Sample(keep.shape[0], task.axis_names, task.target)
    result = batch_sums(
        task.loss_fn,
        params,
        batch,
        weights,
        task.variance,
        sample,
        twice=task.weighted,
        layouts=task.layouts,
    )
    squares = sum_entries(result.squares, task.variance)
    value = kept_sum(times(result.losses, shares), keep)
    return Sums(value, result.gradient, squares, result.shift, result.again), result.aux


def per_example(
    task: Task, params: PyTree, batch: PyTree, keep: jax.Array, shares: jax.Array
) -> tuple[Sums, PyTree]:
    """Squares of the gradients of examples, each of which is held."""
    gradients_of = per_example_value_and_grad(
        task.loss_fn,
        has_aux=True,
        axis_name=task.axis_names or None,
        spmd_axis_name=task.target.spmd_axis_name,
    )
    (losses, aux), grads = gradients_of(params, batch)
    grads = jax.tree.map(lambda g: times(g, shares), grads)
    squares = jax.tree.map(lambda g: kept_sum(jnp.square(g), keep), grads)
    sums = Sums(
        kept_sum(times(losses, shares), keep),
        jax.tree.map(lambda g: kept_sum(g, keep), grads),
        sum_entries(squares, task.variance),
    )
    if task.weighted:
        square_mean = jax.tree.map(lambda g: kept_sum(times(g, shares), keep), grads)
        sums = sums._replace(square_mean=square_mean)
    return sums, aux


def between(
    task: Task, params: PyTree, batch: PyTree, keep: jax.Array, shares: jax.Array
) -> tuple[Sums, PyTree]:
    """Square of the gradient of a block, which is a group."""

    def total(params: PyTree) -> tuple[jax.Array, PyTree]:
        losses, aux = losses_of(task, params, batch)
        return kept_sum(times(losses, shares), keep), aux

    (value, aux), gradient = jax.value_and_grad(total, has_aux=True)(params)
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    filled = jnp.any(keep)
    size = kept_sum(shares, keep) if task.weighted else jnp.sum(keep, dtype=jnp.float32)
    size = jnp.where(filled, size, 1.0)
    squares = jax.tree.map(lambda g: jnp.square(g) / size, gradient)
    squares = sum_entries(squares, task.variance)
    square_shares = kept_sum(jnp.square(shares), keep) / size if task.weighted else ()
    groups = filled.astype(jnp.float32)
    return Sums(value, gradient, squares, groups=groups, square_shares=square_shares), aux


def kept_sum(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Float32 sum over the examples that are kept, whatever the others hold."""
    kept = jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
    return jnp.sum(kept, axis=0, dtype=jnp.float32)


def times(x: jax.Array, shares: jax.Array) -> jax.Array:
    """What belongs to the examples, in float32, times their shares."""
    return x.astype(jnp.float32) * shares.reshape(shares.shape + (1,) * (x.ndim - 1))


ESTIMATORS: dict[
    split.Method, Callable[[Task, PyTree, PyTree, jax.Array, jax.Array], tuple[Sums, PyTree]]
] = {"auto": factored, "factored": factored, "per_example": per_example, "between": between}
