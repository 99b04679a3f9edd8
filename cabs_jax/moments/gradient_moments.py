"""The moments of a batch of gradients, from a per-example loss function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from cabs_jax.moments import estimators, parameters, sharding, shards, split
from cabs_jax.moments.blocks import over_blocks
from cabs_jax.moments.estimators import ESTIMATORS, Sums, Task, averaged_losses, kept_sum, times
from cabs_jax.moments.parameters import LossAndAux
from cabs_jax.moments.per_example import (
    batch_size_of,
    loss_and_aux,
    loss_of_one,
    per_example_value_and_grad,
)
from cabs_jax.moments.randomness import check_rng, keys_of_examples, with_key
from cabs_jax.moments.shards import Layouts
from cabs_jax.moments.split import Method
from cabs_jax.moments.target import (
    AxisNames,
    Kernels,
    Platform,
    Target,
    check_platform,
    with_kernels,
)
from cabs_jax.moments.weighting import check_weights, usable, weighted_moments
from cabs_jax.statistics import (
    GradientMoments,
    PyTree,
    Variance,
    moments_from_per_example,
    sum_over,
)

Moments_co = TypeVar("Moments_co", covariant=True)


class MomentsFunction(Protocol[Moments_co]):
    """`(params, batch, mask=None, ...) -> GradientMoments`, or `(moments, aux)` with aux."""

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        mask: ArrayLike | None = None,
        *,
        rng: jax.Array | None = None,
        weights: ArrayLike | None = None,
        averaged_params: PyTree = None,
    ) -> Moments_co:
        """Measures a batch."""


class Options(TypedDict, total=False):
    """The options of `gradient_moments`, which explains them."""

    method: Method
    variance: Variance
    keep_batch_dim: bool
    microbatch_size: int | None
    groups: int | None
    examples_per_loss: int | None
    axis_name: AxisNames | None
    mesh: jax.sharding.Mesh | None
    param_specs: PyTree
    spmd_axis_name: AxisNames | None
    reduce_dtype: DTypeLike | None
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
    microbatch_size: int | None = None,
    groups: int | None = None,
    examples_per_loss: int | None = None,
    axis_name: AxisNames | None = None,
    mesh: jax.sharding.Mesh | None = None,
    param_specs: PyTree = None,
    spmd_axis_name: AxisNames | None = None,
    reduce_dtype: DTypeLike | None = None,
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
        `has_aux`; `loss_fn(params, example, rng)` where the call is given `rng`. A loss in which
        examples see one another (batch normalisation in training mode) has no per-example
        gradients, but see `examples_per_loss`. The parameters are the floating-point arrays of
        `params`, which may be a whole module of flax nnx (with variables of other kinds than
        `nnx.Param`, which are no parameters) or Equinox.
      method: "factored" (and, today, "auto"): exact, at nearly the price of the mean gradient.
        "per_example": exact, holds every gradient; the reference. "between": an estimate of the
        trace from the means ḡ_k of G groups of n_k examples, nearly free,
        (m−1)/m · (Σ_k n_k‖ḡ_k‖² − m‖ḡ‖²)/(G−1), with relative standard deviation
        √(2 tr(Σ²)/((G−1)(tr Σ)²)).
      variance: "trace" for a scalar, "by_parameter" for a tree like the parameters with a scalar
        for each, of which the trace is the sum, "diagonal" for one with a number for each entry.
      has_aux: Whether `loss_fn` returns auxiliary data, which is returned per example.
      keep_batch_dim: Whether `loss_fn` expects its example as a batch of one.
      microbatch_size: Work through the batch (each device through its shard) in blocks of this
        size, which bounds the memory. It must divide the batch. Blocks that are all padding at the
        end of the batch are skipped. Under `jit` on Auto axes without `mesh`, an array shows the
        mesh it is on, but not how it is split: each block is then taken in equal parts from as many
        stretches of the batch as the axes have devices (those of `spmd_axis_name`, where given),
        and fewer blocks are all padding.
      groups: Number of groups for "between": on one device, of the batch; on a mesh, of each shard
        (1 by default, so that the shards are the groups).
      examples_per_loss: For examples that see one another, as in batch normalisation or contrastive
        losses: `loss_fn(params, group)` is then the mean loss of a group of this many, and
        method="between" takes one group after another. What is estimated is the gradient of this
        loss, which changes with the size of the group, and not that of the whole batch as one
        group; ξ is n times the variance of the groups' gradients, so that ξ/m is that of their
        mean. The size must divide the batch (or shard), there is no mask, and `aux` is per group.
      axis_name: Mesh axis or axes that split the batch: inside your own `shard_map`, or together
        with `mesh`.
      mesh: Wrap a `shard_map` over this mesh. Not needed where the sharding is visible (Explicit
        axes); on Auto meshes all methods are right without it, and "between" uses it to find its
        groups.
      param_specs: With `mesh`, how the parameters are split over the axes of the batch (FSDP): a
        `PartitionSpec` for all, or a tree of them that is a prefix of `params`; read off the arrays
        where these axes are Explicit. Such parameters are gathered where they are used, those of a
        `scan` layer by layer, in the dtype that the loss casts them to; each device is left with
        its part of the mean and of a diagonal variance, added up in float32. `averaged_params` are
        taken to be split likewise. For "factored"; other methods gather all at the start.
      spmd_axis_name: Auto mesh axis or axes that split the batch, as in `jax.vmap`: the work is
        left to the compiler, which is told to keep the examples where they are, and gathers
        parameters that are split over the same axis (FSDP) where they are used.
      reduce_dtype: With `mesh`, `axis_name` or visible shardings, what gradients are added up in
        over devices, float32 by default: jnp.bfloat16 sends half the bytes, as JAX's own gradient
        does where weights are cast to it, and rounds the mean at each addition, so that a variance
        below a hundredth of its square drowns. Everything else stays in float32.
      platform: What is compiled for, "cpu", "gpu" or "tpu". By default that of the devices of the
        mesh which the arrays are on, or else JAX's default backend. It chooses between ways of
        equal result; to be given where a process compiles for one device that it does not have.
      kernels: Whether dense layers of several positions and convolutions are measured by Pallas
        kernels on TPUs. They have been compiled for v5e, v5p and v6e, but not run on a chip. For
        the trace; what they do not cover is measured as without them. On several devices they need
        `mesh` or `axis_name`. "interpret" runs them on any platform, slowly, to be checked.

    Returns:
      A function `(params, batch, mask=None, *, rng=None, weights=None, averaged_params=None)` that
      returns `GradientMoments`, or `(moments, aux)`. The leaves of `batch` have shape (m, ...);
      `mask`, boolean (m,), is False for padding, which has no influence whatever it holds. With
      nothing but padding, everything is 0; with padding in all groups but one, the variance is NaN.
      What is no parameter (an integer, a Python number, a key, a function) has None in the mean and
      in a diagonal variance; `nnx.Optimizer` and `eqx.apply_updates` leave it alone, where
      `optax.apply_updates` wants the parameters without it, as from `eqx.filter`.

      With `rng`, one key, which should be another at every step, the loss of the i-th real example
      is given `jax.random.fold_in(rng, i)`: the same however the batch is padded or split.

      With `weights`, w_i ≥ 0 of shape (m,), such as the numbers of tokens of sequences whose ℓ_i
      are means over tokens, the value is Σ w_i ℓ_i / Σ w_i and the mean its gradient. The count is
      the effective size n = (Σ w_i)²/Σ w_i², rounded, and the variance that of one of so many
      examples, ξ = Σ_i w_i²‖g_i − ḡ‖²/Σ w_i²: to first order, ξ/n estimates E‖ḡ − ∇F‖². Weights
      of 0 are padding; a negative one makes all results NaN. The exact methods take one more
      product for each use of a parameter: the operations of 1.3 to 1.5 plain gradients in all.

      With `averaged_params`, a running average of the parameters such as `optax.ema` keeps,
      `averaged_value` is their mean loss on the same batch, keys and weights included, for one more
      forward pass: what `cabs(optimal_value="estimated")` tells noise by.

    Raises:
      TypeError: If the loss is not a scalar, the mask not boolean, a parameter complex or not an
        array; if `rng` is no key, or only one of the loss and the call has it; if weights are no
        numbers; if the loss draws random numbers by a key that is among the parameters (a module's
        own, in dropout), the same for all examples, or changes a running average of its module.
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
    split.check_options(method, variance, microbatch_size, groups)
    split.check_coupling(examples_per_loss, method, groups, keep_batch_dim)
    check_platform(platform)
    sharding.check_spmd(spmd_axis_name, mesh, axis_name)
    shards.check_specs(param_specs, mesh, method)
    shards.check_reduce_dtype(reduce_dtype, spmd_axis_name, method)
    of_tree = loss_and_aux(loss_of_one(loss_fn, has_aux) if keep_batch_dim else loss_fn, has_aux)

    def on_shard(
        axis_names: tuple[str, ...],
        target: Target,
        parts: parameters.Split,
        layouts: Layouts,
        averaged_layouts: Layouts,
        given: tuple[PyTree, PyTree, jax.Array | None, list[jax.Array]],
        batch: PyTree,
        mask: jax.Array | None,
        weights: jax.Array | None,
    ) -> tuple[GradientMoments, PyTree]:
        params, averaged_params, rng = sharding.vary(given[:3], axis_names)
        size = batch_size_of(batch)
        if weights is not None:
            weights = usable(weights, mask)
            mask = weights != 0
        keep = sharding.vary(jnp.ones(size, jnp.bool_), axis_names) if mask is None else mask
        loss_of_tree = of_tree
        if rng is not None:
            loss_of_tree = with_key(of_tree)
            batch = batch, keys_of_examples(rng, keep, axis_names)
        if examples_per_loss is None:
            parameters.check_randomness(loss_of_tree, parts, given[3], batch)
        loss = parameters.of_parameters(loss_of_tree, parts, given[3])
        plain = averaged_params is None and weights is None
        if method == "per_example" and microbatch_size is None and plain:
            return _reference(loss, params, batch, mask, variance, axis_names, target)
        real = jnp.sum(keep, dtype=jnp.int32)
        count = sum_over(real, axis_names or None)
        if weights is None:
            shares = jnp.broadcast_to(1.0 / jnp.maximum(count, 1).astype(jnp.float32), (size,))
            shares = sharding.vary(shares, axis_names)
        else:
            both = jnp.sum(weights), jnp.sum(jnp.square(weights))
            weight_sums = sum_over(both, axis_names or None)
            shares = weights / jnp.where(weight_sums[0] == 0, 1.0, weight_sums[0])
        coupled = examples_per_loss is not None
        task = Task(loss, variance, axis_names, target, weights is not None, coupled, layouts)
        estimate = functools.partial(ESTIMATORS[method], task, params)

        def of_block(examples: tuple[PyTree, jax.Array, jax.Array]) -> tuple[PyTree, PyTree]:
            of_params, rows = estimate(*examples)
            if averaged_params is None:
                return (of_params, None), rows
            batch, keep, shares = examples
            losses = averaged_losses(task, averaged_params, batch, averaged_layouts)
            return (of_params, kept_sum(times(losses, shares), keep)), rows

        sums, aux = over_blocks(
            of_block,
            (batch if mask is None else split.fill_padding(batch, keep), keep, shares),
            split.block_size(size, method, microbatch_size, groups, axis_names, examples_per_loss),
            lanes=target.lanes,
            keep=None if mask is None or method == "between" else keep,
        )
        if mask is not None:
            sums = jax.tree.map(lambda s: jnp.where(real > 0, s, jnp.zeros_like(s)), sums)
        local, averaged_value = sums
        total = estimators.sum_over_devices(local, variance, layouts, axis_names, reduce_dtype)
        averaged_value = sum_over(averaged_value, axis_names or None)
        squares = functools.partial(shards.squares_of_parts, layouts, variance)
        if weights is None:
            moments = _moments(total, count, params, method, squares)
        else:
            moments = weighted_moments(total, weight_sums, params, squares)
        return moments._replace(averaged_value=averaged_value), aux

    def compute(
        params: PyTree,
        batch: PyTree,
        mask: ArrayLike | None = None,
        *,
        rng: jax.Array | None = None,
        weights: ArrayLike | None = None,
        averaged_params: PyTree = None,
    ) -> Any:
        parts = parameters.split(params)
        check_rng(rng, loss_fn)
        if averaged_params is not None:
            averaged_params = parameters.split(averaged_params).parameters
            parameters.check_like(averaged_params, parts.parameters)
        split.check_mask(mask, batch_size_of(batch))
        check_weights(weights, batch_size_of(batch))
        split.check_coupled(examples_per_loss, mask=mask, weights=weights, rng=rng)
        given = parts.parameters, averaged_params, rng, parts.arrays
        mesh_used, axis_names = sharding.resolve(mesh, axis_name, batch)
        target = sharding.target(platform, mesh_used, axis_names, spmd_axis_name, (batch, given))
        target = with_kernels(target, kernels)
        late = mesh_used is not None and method in {"auto", "factored"}
        specs, averaged_specs = (
            shards.read(param_specs, tree, axis_names) if late and tree is not None else None
            for tree in given[:2]
        )
        measure: Callable[..., Any] = functools.partial(
            on_shard,
            axis_names,
            target,
            parts,
            shards.layouts_of(specs, parts.parameters, target, reduce_dtype),
            shards.layouts_of(averaged_specs, averaged_params, target),
        )
        if mesh_used is not None:
            ins, outs = shards.specs_for(specs, averaged_specs, variance, weights is not None)
            measure = sharding.per_shard(measure, mesh_used, axis_names, outs, ins)
        moments, aux = measure(given, batch, mask, weights)
        return (moments, aux) if has_aux else moments

    return compute


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
    total: Sums,
    count: jax.Array,
    params: PyTree,
    method: Method,
    squares_of: Callable[[PyTree], PyTree],
) -> GradientMoments:
    """Turns sums over the whole batch into moments; there are none of an empty one."""
    examples = jnp.maximum(count, 1).astype(jnp.float32)
    mean = total.gradient

    def spread(squares: jax.Array, squared_mean: jax.Array) -> jax.Array:
        if method == "between":
            freedom = jnp.where(total.groups > 1, total.groups - 1, jnp.nan)
            estimate = (examples * squares - squared_mean) / freedom * (examples - 1)
        else:
            estimate = examples * squares - squared_mean
        # Squares of finite gradients may overflow, and then give ∞ − ∞ or 0·∞.
        finite = jnp.isfinite(squares) & jnp.isfinite(squared_mean)
        estimate = jnp.where(~finite & ~jnp.isnan(squared_mean), jnp.inf, estimate)
        return jnp.where(count > 0, jnp.maximum(estimate, 0.0), 0.0)

    spreads = jax.tree.map(spread, total.squares, squares_of(mean))
    if jax.tree.leaves(total.shift):
        mean = jax.tree.map(jnp.add, mean, total.shift)
    mean = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), mean, params)
    return GradientMoments(total.value, mean, spreads, count)
