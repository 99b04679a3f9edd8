"""The moments of a batch of gradients, from a per-example loss function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cabs_jax._arguments import check_parameters
from cabs_jax.moments import sharding, split
from cabs_jax.moments.blocks import over_blocks
from cabs_jax.moments.estimators import ESTIMATORS, Sums, Task
from cabs_jax.moments.per_example import (
    LossAndAux,
    batch_size_of,
    loss_and_aux,
    per_example_value_and_grad,
)
from cabs_jax.moments.split import Method
from cabs_jax.moments.target import (
    AxisNames,
    Kernels,
    Platform,
    Target,
    check_platform,
    with_kernels,
)
from cabs_jax.statistics import (
    GradientMoments,
    PyTree,
    Variance,
    moments_from_per_example,
    sum_over,
    tree_squared_norm,
)

Moments_co = TypeVar("Moments_co", covariant=True)


class MomentsFunction(Protocol[Moments_co]):
    """`(params, batch, mask=None) -> GradientMoments`, or `(moments, aux)` where there is aux."""

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        mask: ArrayLike | None = None,
        *,
        averaged_params: PyTree = None,
    ) -> Moments_co:
        """Measures a batch."""


class Options(TypedDict, total=False):
    """The options of `gradient_moments`, which explains them."""

    method: Method
    variance: Variance
    keep_batch_dim: bool
    subsample: int | None
    microbatch_size: int | None
    groups: int | None
    axis_name: AxisNames | None
    mesh: jax.sharding.Mesh | None
    spmd_axis_name: AxisNames | None
    platform: Platform | None
    kernels: Kernels


@overload
def gradient_moments(
    loss_fn: Callable[..., Any], *, has_aux: Literal[False] = False, **options: Unpack[Options]
) -> MomentsFunction[GradientMoments]: ...
@overload
def gradient_moments(
    loss_fn: Callable[..., Any], *, has_aux: Literal[True], **options: Unpack[Options]
) -> MomentsFunction[tuple[GradientMoments, PyTree]]: ...
@overload
def gradient_moments(
    loss_fn: Callable[..., Any], *, has_aux: bool, **options: Unpack[Options]
) -> MomentsFunction[Any]: ...
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
    axis_name: AxisNames | None = None,
    mesh: jax.sharding.Mesh | None = None,
    spmd_axis_name: AxisNames | None = None,
    platform: Platform | None = None,
    kernels: Kernels = False,
) -> MomentsFunction[Any]:
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
      subsample: Measure only n examples, the first of the batch, or as many of each of its shards:
        (1/n) Σ‖g_i‖² minus ‖ḡ‖² of the whole batch has the same expectation, at a fraction of
        the cost, where the batch is shuffled. One sorted by class, or by length, would be
        measured by its beginning. The mean gradient is always that of the whole batch.
      microbatch_size: Work through the batch (each device through its shard) in blocks of this
        size, which bounds the memory. It must divide the batch. Blocks that are all padding at the
        end of the batch are skipped. Under `jit` on Auto axes without `mesh`, an array shows the
        mesh it is on, but not how it is split: each block is then taken in equal parts from as many
        stretches of the batch as the axes have devices (those of `spmd_axis_name`, where given),
        and fewer blocks are all padding.
      groups: Number of groups for "between": on one device, of the batch; on a mesh, of each shard
        (1 by default, so that the shards are the groups).
      axis_name: Mesh axis or axes that split the batch: inside your own `shard_map`, or together
        with `mesh`.
      mesh: Wrap a `shard_map` over this mesh. Not needed where the sharding is visible (Explicit
        axes); on Auto meshes all methods are right without it, and "between" uses it to find its
        groups.
      spmd_axis_name: Auto mesh axis or axes that split the batch, as in `jax.vmap`: the work is
        left to the compiler, which is told to keep the examples where they are. It is what
        parameters need that are split over the same axis (FSDP), and are then gathered where they
        are used; `mesh` would gather them all at the start.
      platform: What is compiled for, "cpu", "gpu" or "tpu". By default that of the devices of the
        mesh which the arrays are on, or else JAX's default backend. It chooses between ways of
        equal result; to be given where a process compiles for one device that it does not have.
      kernels: Whether dense layers of several positions and convolutions are measured by Pallas
        kernels on TPUs. They have been compiled for v5e, v5p and v6e, but not run on a chip. For
        the trace; what they do not cover is measured as without them. On several devices they need
        `mesh` or `axis_name`. "interpret" runs them on any platform, slowly, to be checked.

    Returns:
      A function `(params, batch, mask=None, *, averaged_params=None) -> GradientMoments`, or
      `(moments, aux)`. The leaves of `batch` have shape (m, ...); `mask`, boolean (m,), is False
      for padding, which has no influence whatever it holds. With nothing but padding, everything is
      0; where `subsample` or `groups` leaves nothing to measure, the variance is NaN. With
      `averaged_params`, a running average of the parameters such as `optax.ema` keeps,
      `averaged_value` is their mean loss on the same batch, for one more forward pass: what
      `cabs(optimal_value="estimated")` tells noise by.

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
    split.check_options(method, variance, subsample, microbatch_size, groups)
    check_platform(platform)
    sharding.check_spmd(spmd_axis_name, mesh, axis_name)
    of_example = loss_and_aux(_of_one(loss_fn, has_aux) if keep_batch_dim else loss_fn, has_aux)

    def on_shard(
        axis_names: tuple[str, ...],
        target: Target,
        params_and_averaged: tuple[PyTree, PyTree],
        batch: PyTree,
        mask: jax.Array | None,
    ) -> tuple[GradientMoments, PyTree]:
        params, averaged_params = sharding.vary(params_and_averaged, axis_names)
        if method == "per_example" and microbatch_size is None and averaged_params is None:
            return _reference(of_example, params, batch, mask, variance, axis_names, target)
        size = batch_size_of(batch)
        keep = sharding.vary(jnp.ones(size, jnp.bool_), axis_names) if mask is None else mask
        real = jnp.sum(keep, dtype=jnp.int32)
        count = sum_over(real, axis_names or None)
        share = sharding.vary(1.0 / jnp.maximum(count, 1).astype(jnp.float32), axis_names)
        task = Task(of_example, variance, subsample, axis_names, target)
        estimate = functools.partial(ESTIMATORS[method], task, params, share)

        def of_block(examples: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
            of_params, rows = estimate(*examples)
            if averaged_params is None:
                return (of_params, None), rows
            losses, _ = target.vmap(functools.partial(of_example, averaged_params))(examples[0])
            kept = jnp.where(examples[1], losses.astype(jnp.float32), 0)
            return (of_params, jnp.sum(kept) * share), rows

        sums, aux = over_blocks(
            of_block,
            (batch if mask is None else _fill(batch, keep), keep),
            split.block_size(size, method, microbatch_size, groups, axis_names),
            lanes=target.lanes,
            keep=None if mask is None or method == "between" else keep,
        )
        if mask is not None:
            sums = jax.tree.map(lambda s: jnp.where(real > 0, s, jnp.zeros_like(s)), sums)
        total, averaged_value = sum_over(sums, axis_names or None)
        moments = _moments(total, count, params, method, variance)
        return moments._replace(averaged_value=averaged_value), aux

    def compute(
        params: PyTree,
        batch: PyTree,
        mask: ArrayLike | None = None,
        *,
        averaged_params: PyTree = None,
    ) -> Any:
        check_parameters(params)
        if averaged_params is not None:
            _check_like_parameters(averaged_params, params)
        split.check_mask(mask, batch_size_of(batch))
        mesh_used, axis_names = sharding.resolve(mesh, axis_name, batch)
        target = sharding.target(platform, mesh_used, axis_names, spmd_axis_name, (batch, params))
        target = with_kernels(target, kernels)
        measure: Callable[..., Any] = functools.partial(on_shard, axis_names, target)
        if mesh_used is not None:
            out_specs = sharding.WHOLE, sharding.SPLIT
            measure = sharding.per_shard(measure, mesh_used, axis_names, out_specs)
        moments, aux = measure((params, averaged_params), batch, mask)
        return (moments, aux) if has_aux else moments

    return compute


def _check_like_parameters(averaged_params: PyTree, params: PyTree) -> None:
    shapes, wanted = (jax.tree.map(jnp.shape, tree) for tree in (averaged_params, params))
    if shapes != wanted:
        raise ValueError(
            f"averaged_params must be a tree like the parameters, of shapes {wanted}, got shapes "
            f"{shapes}."
        )


def _reference(
    loss_fn: LossAndAux,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    variance: Variance,
    axis_names: tuple[str, ...],
    target: Target,
) -> tuple[GradientMoments, PyTree]:
    """The moments by their definition, from all gradients at once."""
    axis_name, spmd = axis_names or None, target.spmd_axis_name
    gradients_of = per_example_value_and_grad(
        loss_fn, has_aux=True, axis_name=axis_name, spmd_axis_name=spmd
    )
    (losses, aux), grads = gradients_of(params, batch)
    moments = moments_from_per_example(losses, grads, mask, variance=variance, axis_name=axis_name)
    return moments, aux


def _moments(
    total: Sums, count: jax.Array, params: PyTree, method: Method, variance: Variance
) -> GradientMoments:
    """Turns sums over the whole batch into moments; there are none of an empty one."""
    examples = jnp.maximum(count, 1).astype(jnp.float32)
    measured, mean = total.measured.astype(jnp.float32), total.gradient

    def spread(squares: jax.Array, squared_mean: jax.Array) -> jax.Array:
        if method == "between":
            freedom = jnp.where(measured > 1, measured - 1, jnp.nan)
            estimate = (examples * squares - squared_mean) / freedom * (examples - 1)
        else:
            per_measured = examples / jnp.where(measured > 0, measured, jnp.nan)
            estimate = examples * squares * per_measured - squared_mean
        # Squares of finite gradients may overflow, and then give ∞ − ∞ or 0·∞.
        finite = jnp.isfinite(squares) & jnp.isfinite(squared_mean)
        overflow = ~finite & ~jnp.isnan(squared_mean) & (measured > 0)
        estimate = jnp.where(overflow, jnp.inf, estimate)
        return jnp.where(count > 0, jnp.maximum(estimate, 0.0), 0.0)

    if variance == "trace":
        spreads: PyTree = spread(total.squares, tree_squared_norm(mean))
    else:
        spreads = jax.tree.map(spread, total.squares, jax.tree.map(jnp.square, mean))
    if jax.tree.leaves(total.shift):
        mean = jax.tree.map(jnp.add, mean, total.shift)
    mean = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), mean, params)
    return GradientMoments(total.value, mean, spreads, count)


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
