"""Weights of examples: the mean is a ratio of two sums, and so is its noise.

With weights w_i, such as the numbers of tokens of sequences whose ℓ_i are means over tokens, the
mean gradient is ḡ = Σ w_i g_i / Σ w_i. A batch is m draws of pairs (w_i, g_i), and ḡ is a ratio of
two means over them. To first order around the expectations

    ḡ − ∇F ≈ (1/m) Σ_i w_i (g_i − ∇F) / E[w],

a mean of independent terms, so that with W = Σ w_i and S = Σ w_i²

    E‖ḡ − ∇F‖² ≈ Σ_i w_i² ‖g_i − ḡ‖² / W² = ξ/n,    n = W²/S,    ξ = Σ_i w_i² ‖g_i − ḡ‖² / S.

n is the effective size: the number of examples of equal weight that would give as good a mean, and
ξ the variance of the gradient of one of them. Equal weights give n = m and the usual ξ. (Cochran,
Sampling Techniques, 1977, §6; Kish, Survey Sampling, 1965, for n.)

ḡ is not the mean h = Σ w_i² g_i / S around which such a sum of squares is smallest. Hence

    ξ = Σ_i w_i² ‖g_i‖² / S − ‖h‖² + ‖h − ḡ‖².

The norms and ḡ come from one backward pass, as without weights. h comes from it too, as a second
sum at every site. The trace alone needs no more of it than ⟨h, ḡ⟩, but merging needs h.

Between groups, whose means ḡ_k of weight W_k and with S_k have the variances ξ·S_k/W_k² to first
order in one over their sizes,

    E[Σ_k W_k ‖ḡ_k‖² − W‖ḡ‖²] = ξ·(Σ_k S_k/W_k − S/W),

so that the quotient of the two estimates ξ, times 1 − 1/n for its own mean; h is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cabs_jax.moments.estimators import Sums
from cabs_jax.statistics import (
    GradientMoments,
    PyTree,
    WeightSums,
    effective_size,
)


def check_weights(weights: Any, size: int) -> None:
    """Raises unless weights are None or real numbers of shape (size,).

    Raises:
      TypeError: If they are no array of integers or floats.
      ValueError: If they have another shape.
    """
    if weights is None:
        return
    dtype = getattr(weights, "dtype", None)
    if dtype is None or not any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)
    ):
        found = type(weights).__name__ if dtype is None else dtype
        raise TypeError(
            f"weights must be an array of integers or floats, got {found}; what only tells real"
            " examples from padding is a mask."
        )
    if jnp.shape(weights) != (size,):
        raise ValueError(
            f"weights must have shape ({size},) like the batch, got {jnp.shape(weights)}."
        )


def usable(weights: ArrayLike, mask: jax.Array | None) -> jax.Array:
    """Float32 weights, 0 for padding, and NaN where one is negative, which shows in all results."""
    w = jnp.asarray(weights, jnp.float32)
    kept = w if mask is None else jnp.where(mask, w, 0.0)
    return jnp.where(kept < 0, jnp.nan, kept)


def weighted_moments(
    total: Sums,
    sums: tuple[jax.Array, jax.Array],
    params: PyTree,
    squares_of: Callable[[PyTree], PyTree],
) -> GradientMoments:
    """Turns sums over a whole batch into moments; there are none of an empty one.

    Args:
      total: The sums, each example with its share w_i/W.
      sums: W and S.
      params: The parameters.
      squares_of: The squares of a tree's entries, summed as the kind of variance sums them.
    """
    weight, squares = sums
    exists = squares != 0
    share_squares = squares / jnp.where(exists, jnp.square(weight), 1.0)  # 1/n
    mean = total.gradient

    if jax.tree.leaves(total.square_mean):
        n = 1.0 / jnp.where(exists, share_squares, 1.0)
        square_mean = jax.tree.map(lambda g: g * n, total.square_mean)
        away = jax.tree.map(jnp.subtract, square_mean, mean)

        def spread(second: jax.Array, around: jax.Array, distance: jax.Array) -> jax.Array:
            estimate = jnp.maximum(second * n - around, 0.0) + distance
            return jnp.where(exists, jnp.where(jnp.isinf(second), jnp.inf, estimate), 0.0)

        spreads = jax.tree.map(spread, total.squares, squares_of(square_mean), squares_of(away))
    else:
        square_mean = None
        freedom = jnp.where(total.groups > 1, total.square_shares - share_squares, jnp.nan)

        def spread_of_groups(second: jax.Array, squared_mean: jax.Array) -> jax.Array:
            estimate = jnp.maximum(second - squared_mean, 0.0) / freedom * (1 - share_squares)
            return jnp.where(exists, jnp.where(jnp.isinf(second), jnp.inf, estimate), 0.0)

        spreads = jax.tree.map(spread_of_groups, total.squares, squares_of(mean))
    if jax.tree.leaves(total.shift):
        mean = jax.tree.map(jnp.add, mean, total.shift)
        square_mean = jax.tree.map(jnp.add, square_mean, total.shift)
    mean = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), mean, params)
    count = effective_size(weight, squares)
    return GradientMoments(
        total.value, mean, spreads, count, weights=WeightSums(*sums, square_mean)
    )
