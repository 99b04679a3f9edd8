"""The moments of a batch of gradients, from a per-example loss function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax._arguments import check_parameters
from cabs_jax.moments import jaxprs, sharding, split
from cabs_jax.moments.factored.batch_sums import batch_sums
from cabs_jax.moments.per_example import batch_size_of, checked, per_example_value_and_grad
from cabs_jax.moments.split import Method
from cabs_jax.statistics import (
    GradientMoments,
    Variance,
    moments_from_per_example,
    sum_over,
    tree_squared_norm,
    tree_sum,
)

PyTree = Any


class Sums(NamedTuple):
    """What is added up over blocks and devices, each example weighted by 1/m.

    The weight goes in where the backward pass starts, so that what comes out is the mean gradient
    and need not be touched again.

    Attributes:
      value: Σ ℓ_i/m.
      gradient: Σ g_i/m, float32.
      squares: Σ ‖g_i/m‖² of the measured examples, or of the entries' squares; between groups of
        n_k examples, Σ_k ‖Σ_i g_i/m‖²/n_k.
      measured: Number of real examples measured, or of non-empty groups.
      shift: Part of Σ g_i/m that is the same for every example and not in `gradient`, or ().
    """

    value: jax.Array
    gradient: PyTree
    squares: PyTree
    measured: jax.Array
    shift: PyTree = ()


ParamsAndWeight = tuple[PyTree, jax.Array]
Estimator = Callable[[ParamsAndWeight, PyTree, jax.Array], tuple[Sums, PyTree]]


def gradient_moments(
    loss_fn: Callable[..., Any],
    *,
    method: Method = "auto",
    variance: Variance = "trace",
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    subsample: int | None = None,
    microbatch_size: int | None = None,
    groups: int | None = None,
    axis_name: sharding.AxisNames | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., Any]:
    """Mean loss, mean gradient and gradient variance of a batch.

    The variance is that of the per-example gradients g_i around their mean ḡ,

        tr Σ̂ = (1/m) Σ_i ‖g_i‖² − ‖ḡ‖²,

    as CABS needs it (Balles et al. 2017, eq. 22). It is exact for every differentiable
    `loss_fn`, with nothing to register: the function is traced, and where a parameter meets the
    example the norm of its gradient follows from the operands and the output's cotangent. What no
    rule covers is measured from per-example gradients of those parameters alone; `explain` shows
    which these are.

    Wrap it, or the train step that calls it, in `jax.jit`: each uncompiled call traces the loss
    anew, and on a mesh compiles it. Sums are in float32 whatever the model's dtype; the backward
    pass starts from 1/m, so a float16 model needs a loss scale, as it does for its mean gradient.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar loss` of one example, or `(loss, aux)` with
        `has_aux`. Pass keys for random numbers inside the example. A loss in which examples see
        one another (batch normalisation in training mode) has no per-example gradients.
      method: "factored" (and, today, "auto"): exact, at nearly the price of the mean gradient.
        "per_example": exact, holds every gradient; the reference. "between": an estimate of the
        trace from the means ḡ_k of G groups of n_k examples, nearly free,
        (m−1)/m · (Σ_k n_k‖ḡ_k‖² − m‖ḡ‖²)/(G−1), with relative standard deviation
        √(2 tr(Σ²)/((G−1)(tr Σ)²)).
      variance: "trace" for a scalar, "diagonal" for a tree like the parameters.
      has_aux: Whether `loss_fn` returns auxiliary data, which is returned per example.
      keep_batch_dim: Whether `loss_fn` expects its example as a batch of one.
      subsample: Measure only n examples, evenly spread over the batch (and its shards):
        (1/n) Σ‖g_i‖² minus ‖ḡ‖² of the whole batch has the same expectation, at a fraction of
        the cost. The mean gradient is always that of the whole batch.
      microbatch_size: Work through the batch (each device through its shard) in blocks of this
        size, which bounds the memory. It must divide the batch. Blocks that are all padding at the
        end of the batch are skipped. In a process of several devices whose batch may be split over
        them unseen (Auto axes and no `mesh`), a block takes a part of each device's rows, so that
        fewer are skipped.
      groups: Number of groups for "between": on one device, of the batch; on a mesh, of each shard
        (1 by default, so that the shards are the groups).
      axis_name: Mesh axis or axes that split the batch: inside your own `shard_map`, or together
        with `mesh`.
      mesh: Wrap a `shard_map` over this mesh. Not needed where the sharding is visible (Explicit
        axes); on Auto meshes all methods are right without it, and "between" uses it to find its
        groups.

    Returns:
      A function `(params, batch, mask=None) -> GradientMoments`, or `(moments, aux)`. The leaves of
      `batch` have shape (m, ...); `mask`, boolean (m,), is False for padding, which has no
      influence whatever it holds. With nothing but padding, everything is 0; where `subsample` or
      `groups` leaves nothing to measure, the variance is NaN.

    Raises:
      TypeError: If the loss is not a scalar, the mask not boolean, or a parameter complex.
      ValueError: If options contradict each other or the batch, with the values.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return 0.5 * (params @ example["x"] - example["y"]) ** 2
      >>> batch = {"x": jnp.eye(2), "y": jnp.zeros(2)}
      >>> moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn))
      >>> moments = moments_of(jnp.array([1.0, 2.0]), batch)
      >>> moments.mean.tolist(), float(moments.variance), int(moments.count)
      ([0.5, 1.0], 1.25, 2)
    """
    split.check(method, variance, subsample, microbatch_size, groups)
    if keep_batch_dim:
        loss_fn = _of_one(loss_fn, has_aux)
    loss_fn = checked(loss_fn, has_aux)

    def compute(params: PyTree, batch: PyTree, mask: jax.Array | None = None) -> Any:
        check_parameters(params)
        split.check_mask(mask, batch_size_of(batch))
        mesh_used, axes = sharding.resolve(mesh, axis_name, batch)

        def on_shard(params: PyTree, batch: PyTree, mask: jax.Array | None) -> tuple[Any, Any]:
            params = sharding.vary(params, axes)
            if method == "per_example" and microbatch_size is None:
                return _reference(loss_fn, params, batch, mask, variance, has_aux, axes)
            size = batch_size_of(batch)
            keep = sharding.vary(jnp.ones(size, jnp.bool_), axes) if mask is None else mask
            real = jnp.sum(keep, dtype=jnp.int32)
            count = sum_over(real, axes or None)
            weight = sharding.vary(1.0 / jnp.maximum(count, 1).astype(jnp.float32), axes)
            sums, aux = _add_up(
                _estimator(loss_fn, method, variance, has_aux, subsample, axes),
                (params, weight),
                (batch if mask is None else _fill(batch, keep), keep),
                split.block_size(size, method, microbatch_size, groups, axes),
                lanes=1 if axes else jax.device_count(),
                skip_padding=mask is not None and method != "between",
            )
            if mask is not None:
                sums = jax.tree.map(lambda s: jnp.where(real > 0, s, jnp.zeros_like(s)), sums)
            total = sum_over(sums, axes or None)
            return _moments(total, count, params, method, variance), aux

        if mesh_used is None:
            moments, aux = on_shard(params, batch, mask)
        else:
            moments, aux = sharding.per_shard(
                on_shard, mesh_used, axes, (sharding.WHOLE, sharding.SPLIT)
            )(params, batch, mask)
        return (moments, aux) if has_aux else moments

    return compute


def _reference(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    variance: Variance,
    has_aux: bool,
    axes: tuple[str, ...],
) -> tuple[GradientMoments, PyTree]:
    values, grads = per_example_value_and_grad(loss_fn, has_aux=has_aux, axis_name=axes or None)(
        params, batch
    )
    losses, aux = values if has_aux else (values, ())
    moments = moments_from_per_example(
        losses, grads, mask, variance=variance, axis_name=axes or None
    )
    return moments, aux


def _estimator(
    loss_fn: Callable[..., Any],
    method: Method,
    variance: Variance,
    has_aux: bool,
    subsample: int | None,
    axes: tuple[str, ...],
) -> Estimator:
    """Returns the function that sums up one block of the batch."""

    def factored(shared: ParamsAndWeight, batch: PyTree, keep: jax.Array) -> tuple[Sums, PyTree]:
        params, weight = shared
        weights, size = jnp.where(keep, weight, 0.0), keep.shape[0]
        measured = split.measured(subsample, size, axes)
        result = batch_sums(
            loss_fn,
            params,
            batch,
            weights,
            variance=variance,
            has_aux=has_aux,
            measured=measured,
            axes=axes,
        )
        step = size // measured
        real = jnp.sum(keep[: step * measured : step], dtype=jnp.int32)
        squares = jnp.sum(result.squares) if variance == "trace" else result.squares
        shift = jax.tree.map(lambda g: g * jnp.sum(weights), result.shift)
        value = _kept_sum(result.losses, keep) * weight
        return Sums(value, result.gradient, squares, real, shift), result.aux

    def per_example(shared: ParamsAndWeight, batch: PyTree, keep: jax.Array) -> tuple[Sums, PyTree]:
        params, weight = shared
        values, grads = per_example_value_and_grad(
            loss_fn, has_aux=has_aux, axis_name=axes or None
        )(params, batch)
        losses, aux = values if has_aux else (values, ())
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * weight, grads)
        squares = jax.tree.map(lambda g: _kept_sum(jnp.square(g), keep), grads)
        return Sums(
            _kept_sum(losses, keep) * weight,
            jax.tree.map(lambda g: _kept_sum(g, keep), grads),
            tree_sum(squares) if variance == "trace" else squares,
            jnp.sum(keep, dtype=jnp.int32),
        ), aux

    def between(shared: ParamsAndWeight, batch: PyTree, keep: jax.Array) -> tuple[Sums, PyTree]:
        params, weight = shared

        def total(params: PyTree) -> tuple[jax.Array, PyTree]:
            result = jax.vmap(loss_fn, (None, 0))(params, batch)
            losses, aux = result if has_aux else (result, ())
            return _kept_sum(losses, keep) * weight, aux

        (value, aux), gradient = jax.value_and_grad(total, has_aux=True, allow_int=True)(params)
        gradient = jax.tree.map(_float32_or_zero, gradient, params)
        size = jnp.sum(keep, dtype=jnp.float32)
        squares = jax.tree.map(lambda g: jnp.square(g) / jnp.maximum(size, 1.0), gradient)
        summed = tree_sum(squares) if variance == "trace" else squares
        return Sums(value, gradient, summed, (size > 0).astype(jnp.int32)), aux

    return {"per_example": per_example, "between": between}.get(method, factored)


def _add_up(
    estimator: Estimator,
    shared: ParamsAndWeight,
    examples: tuple[PyTree, jax.Array],
    block: int | None,
    *,
    lanes: int,
    skip_padding: bool,
) -> tuple[Sums, PyTree]:
    """Applies an estimator to the whole batch at once, or block by block.

    Where the batch may be split over `lanes` devices without our knowing, a block takes a part of
    every device's examples, if it divides so.
    """
    batch, keep = examples
    size: int = keep.shape[0]
    if block is None or block == size:
        return estimator(shared, batch, keep)
    axes = tuple(jaxprs.varying_axes(keep))
    if axes or block % lanes or size % lanes:
        lanes = 1
    count = size // block

    def by_block(x: jax.Array) -> jax.Array:
        return x.reshape(lanes, count, block // lanes, *x.shape[1:])

    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        taken = lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)
        return jnp.reshape(taken, (block, *taken.shape[2:]))

    blocks = jax.tree.map(by_block, (batch, keep))

    def evaluate(index: jax.Array) -> tuple[Sums, PyTree]:
        batch, keep = jax.tree.map(lambda x: take(x, index), blocks)
        return estimator(shared, batch, keep)

    def step(index: jax.Array, carry: tuple[Sums, PyTree]) -> tuple[Sums, PyTree]:
        sums, stacked = carry
        more, aux = evaluate(index)
        stacked = jax.tree.map(
            lambda all_, x: lax.dynamic_update_index_in_dim(
                all_, x.reshape(lanes, block // lanes, *x.shape[1:]), index, axis=1
            ),
            stacked,
            aux,
        )
        return jax.tree.map(jnp.add, sums, more), stacked

    def empty(shape: tuple[int, ...], like: Any) -> jax.Array:
        zeros: jax.Array = sharding.vary(jnp.zeros(shape, like.dtype), axes)
        return zeros

    sums, aux = jax.eval_shape(evaluate, jnp.zeros((), jnp.int32))
    start = (
        jax.tree.map(lambda s: empty(s.shape, s), sums),
        jax.tree.map(lambda a: empty((lanes, count, block // lanes, *a.shape[1:]), a), aux),
    )
    last: int | jax.Array = count
    if skip_padding:
        occupied = jnp.any(blocks[1], axis=(0, 2))
        last = jnp.max(jnp.where(occupied, jnp.arange(1, count + 1), 0))
    sums, aux = lax.fori_loop(0, last, step, start)
    return sums, jax.tree.map(lambda a: a.reshape(size, *a.shape[3:]), aux)


def _moments(
    total: Sums, count: jax.Array, params: PyTree, method: Method, variance: Variance
) -> GradientMoments:
    """Turns sums over the whole batch into moments; there are none of an empty one."""
    examples = jnp.maximum(count, 1).astype(jnp.float32)
    units, mean = total.measured.astype(jnp.float32), total.gradient

    def spread(squares: jax.Array, squared_mean: jax.Array) -> jax.Array:
        if method == "between":
            freedom = jnp.where(units > 1, units - 1, jnp.nan)
            estimate = (examples * squares - squared_mean) / freedom * (examples - 1)
        else:
            per_unit = examples / jnp.where(units > 0, units, jnp.nan)
            estimate = examples * squares * per_unit - squared_mean
        return jnp.where(count > 0, jnp.maximum(estimate, 0.0), 0.0)

    shifted = mean
    if jax.tree.leaves(total.shift):
        shifted = jax.tree.map(jnp.add, mean, total.shift)
    return GradientMoments(
        total.value,
        jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), shifted, params),
        spread(total.squares, tree_squared_norm(mean))
        if variance == "trace"
        else jax.tree.map(spread, total.squares, jax.tree.map(jnp.square, mean)),
        count,
    )


def _kept_sum(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Float32 sum over the examples that are kept, whatever the others hold."""
    keep = keep.reshape(keep.shape + (1,) * (x.ndim - 1))
    total: jax.Array = jnp.sum(
        jnp.where(keep, x, jnp.zeros((), x.dtype)), axis=0, dtype=jnp.float32
    )
    return total


def _float32_or_zero(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
    """A gradient in float32; for a parameter that is not floating-point, zeros."""
    if gradient.dtype == jax.dtypes.float0:
        return jnp.zeros(jnp.shape(parameter), jnp.float32)
    return jnp.asarray(gradient, jnp.float32)


def _fill(batch: PyTree, keep: jax.Array) -> PyTree:
    """Overwrites padding with the first real example, so that it computes nothing unusual."""
    place = jnp.arange(keep.shape[0])
    first = place == jnp.min(jnp.where(keep, place, keep.shape[0]))

    def filled(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        shape = keep.shape + (1,) * (x.ndim - 1)
        picked = jnp.where(first.reshape(shape), x, jnp.zeros((), x.dtype))
        row = jnp.any(picked, 0) if x.dtype == jnp.bool_ else jnp.sum(picked, 0, dtype=x.dtype)
        return jnp.where(keep.reshape(shape), x, row[None])

    return jax.tree.map(filled, batch)


def _of_one(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Turns a loss of a batch into a loss of one example, given to it as a batch of one."""

    def of_one(params: PyTree, example: PyTree) -> Any:
        result = loss_fn(params, jax.tree.map(lambda x: x[None], example))
        loss, aux = result if has_aux else (result, ())
        loss = loss.reshape(()) if loss.size == 1 else loss
        return (loss, aux) if has_aux else loss

    return of_one
