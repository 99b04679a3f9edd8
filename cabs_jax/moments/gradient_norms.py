"""The norm of the gradient of every example, without the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cabs_jax.moments import parameters, sharding, split
from cabs_jax.moments.factored.batch_sums import batch_sums
from cabs_jax.moments.factored.values import Sample
from cabs_jax.moments.per_example import batch_size_of, loss_and_aux, per_example_value_and_grad
from cabs_jax.moments.target import AxisNames
from cabs_jax.statistics import PyTree, tree_squared_norm


class NormsFunction(Protocol):
    """`(params, batch, mask=None) -> norms`."""

    def __call__(self, params: PyTree, batch: PyTree, mask: ArrayLike | None = None) -> jax.Array:
        """Measures every example of a batch."""


def per_example_gradient_norms(
    loss_fn: Callable[..., Any],
    *,
    axis_name: AxisNames | None = None,
    mesh: jax.sharding.Mesh | None = None,
    spmd_axis_name: AxisNames | None = None,
) -> NormsFunction:
    """The norm ‖g_i‖ of the gradient of every example of a batch, all parameters together.

    It is measured as `gradient_moments` measures ξ: from what the layers are given and send back,
    at nearly the price of the gradient of the batch, with no gradient of an example in memory. Two
    kinds are the exception: parameters that no rule covers, which `explain` shows, and a loss that
    holds a penalty on its parameters, for which all gradients of the batch are held at once.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar loss` of one example.
      axis_name: Mesh axis or axes that split the batch, as in `per_example_value_and_grad`.
      mesh: Mesh to work on, one shard of the batch per device.
      spmd_axis_name: Auto mesh axis or axes that split the batch, as in `jax.vmap`.

    Returns:
      A function `(params, batch, mask=None) -> norms`. The leaves of `batch` have shape (m, ...);
      `norms` is float32 of shape (m,), split over devices as the batch is, and 0 for the padding
      that `mask`, boolean (m,), marks by False. Call it under `jax.jit`.

    Raises:
      TypeError: If the loss is not a scalar, the mask not boolean, or a parameter complex.
      ValueError: If the leaves of the batch disagree on m, or as in `per_example_value_and_grad`.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return 0.5 * (params @ example["x"] - example["y"]) ** 2
      >>> norms_of = jax.jit(cabs_jax.per_example_gradient_norms(loss_fn))
      >>> norms_of(jnp.array([1.0, 2.0]), {"x": jnp.eye(2), "y": jnp.zeros(2)}).tolist()
      [1.0, 2.0]
    """
    sharding.check_spmd(spmd_axis_name, mesh, axis_name)
    of_tree = loss_and_aux(loss_fn, has_aux=False)

    def compute(params: PyTree, batch: PyTree, mask: ArrayLike | None = None) -> jax.Array:
        parts = parameters.split(params)
        given = parts.parameters, parts.arrays
        split.check_mask(mask, batch_size_of(batch))
        mesh_used, axis_names = sharding.resolve(mesh, axis_name, batch)
        target = sharding.target(None, mesh_used, axis_names, spmd_axis_name, (batch, given))

        def on_shard(
            given: tuple[PyTree, list[jax.Array]], batch: PyTree, mask: jax.Array | None
        ) -> jax.Array:
            params, size = sharding.vary(given[0], axis_names), batch_size_of(batch)
            if mask is not None:
                batch = split.fill_padding(batch, jnp.asarray(mask))
            parameters.check_randomness(of_tree, parts, given[1], batch)
            of_example = parameters.of_parameters(of_tree, parts, given[1])
            sample = Sample(size, axis_names, target)
            weights = sharding.vary(jnp.ones(size, jnp.float32), axis_names)
            sums = batch_sums(of_example, params, batch, weights, "trace", sample)
            squares = sums.squares
            if jax.tree.leaves(sums.shift):  # which belongs to every gradient, not to `squares`
                gradients_of = per_example_value_and_grad(
                    of_example,
                    has_aux=True,
                    axis_name=axis_names or None,
                    spmd_axis_name=target.spmd_axis_name,
                )
                squares = jax.vmap(tree_squared_norm)(gradients_of(params, batch)[1])
            return jnp.sqrt(squares if mask is None else jnp.where(mask, squares, 0))

        measure: Callable[..., Any] = on_shard
        if mesh_used is not None:
            measure = sharding.per_shard(on_shard, mesh_used, axis_names, sharding.SPLIT)
        norms: jax.Array = measure(given, batch, mask)
        return norms

    return compute
