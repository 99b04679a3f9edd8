"""The moments of a batch of gradients, from a per-example loss function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from cabs_jax.moments import sharding
from cabs_jax.moments.per_example import per_example_value_and_grad
from cabs_jax.statistics import GradientMoments, Variance, moments_from_per_example

PyTree = Any


def gradient_moments(
    loss_fn: Callable[..., Any],
    *,
    variance: Variance = "trace",
    has_aux: bool = False,
    axis_name: sharding.AxisNames | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., Any]:
    """Mean loss, mean gradient and gradient variance of a batch, exactly.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar loss`, or `(loss, aux)` with `has_aux`.
      variance: "trace" or "diagonal".
      has_aux: Whether `loss_fn` returns auxiliary data.
      axis_name: Mesh axis or axes that split the batch.
      mesh: Mesh to work on, one shard of the batch per device.

    Returns:
      A function `(params, batch, mask=None) -> GradientMoments`, or `(moments, aux)`.
    """

    def compute(params: PyTree, batch: PyTree, mask: jax.Array | None = None) -> Any:
        _, axes = sharding.resolve(mesh, axis_name, batch)
        split = per_example_value_and_grad(loss_fn, has_aux=has_aux, axis_name=axes or None)

        def on_shard(params: PyTree, batch: PyTree, mask: jax.Array | None) -> tuple[Any, Any]:
            values, grads = split(params, batch)
            losses, aux = values if has_aux else (values, None)
            moments = moments_from_per_example(
                losses, grads, mask, variance=variance, axis_name=axes or None
            )
            return moments, aux

        moments: GradientMoments
        moments, aux = on_shard(params, batch, mask)
        return (moments, aux) if has_aux else moments

    return compute
