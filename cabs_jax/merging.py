"""From the moments of two batches to those of both."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cabs_jax.statistics import (
    GradientMoments,
    PyTree,
    WeightSums,
    effective_size,
    tree_dot,
    tree_squared_norm,
)


def merge_moments(a: GradientMoments, b: GradientMoments) -> GradientMoments:
    """Returns the moments of two disjoint batches together, from the moments of each.

    For gradient accumulation: after the last batch, `update` is given the merged moments, with
    `count` the number of all real examples. With p and q the shares of the two batches and
    δ = ḡ_b − ḡ_a,

        ḡ = ḡ_a + q·δ,    Σ̂ = p·Σ̂_a + q·Σ̂_b + p·q·δδᵀ,

    which is exact but for the rounding of the mean gradients to their dtype. The parameters must be
    the same. Padding counts for nothing, and moments that are all zeros are those of an empty
    batch: start a `lax.scan` from them.

    Where examples have weights, p and q are the shares of Σw, and with P and Q those of Σw², and
    h = Σw²g/Σw² of each batch,

        Σ̂ = P·(Σ̂_a − q·(h_a − ḡ_a)δᵀ − q·δ(h_a − ḡ_a)ᵀ + q²·δδᵀ) + Q·(the same of b with −p),

    the weighted squares around ḡ, which is ḡ_a + q·δ and ḡ_b − p·δ.

    Args:
      a: Moments of the one batch: of `gradient_moments`, or merged.
      b: Moments of the other, with the same kind of variance.

    Returns:
      Moments of both.

    Raises:
      ValueError: If they differ in their gradients' tree, in the kind of variance, or in whether
        they hold an `averaged_value` or `weights`; or if weights were measured between groups,
        where h is not known.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp
      >>> moments_fn = cabs_jax.gradient_moments(lambda w, row: 0.5 * jnp.sum((w - row) ** 2))
      >>> params, x = jnp.zeros(3), jax.random.normal(jax.random.key(0), (4, 8, 3))
      >>> empty = jax.tree.map(jnp.zeros_like, moments_fn(params, x[0]))
      >>> merged, _ = jax.lax.scan(
      ...     lambda m, batch: (merge_moments(m, moments_fn(params, batch)), None), empty, x)
      >>> whole = moments_fn(params, x.reshape(32, 3))
      >>> print(merged.count, jnp.allclose(merged.variance, whole.variance))
      32 True

    References:
      Chan, Golub and LeVeque, [Algorithms for Computing the Sample
      Variance](https://doi.org/10.1080/00031305.1983.10483115), 1983.
    """
    for name, one, other in zip(GradientMoments._fields, a, b, strict=True):
        kinds = [jax.tree.map(jnp.shape, x) for x in (one, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"moments to merge must be of one kind, but their {name} has the shapes "
                f"{kinds[0]} and {kinds[1]}."
            )
    if a.weights is None or b.weights is None:
        weights, sizes = None, (a.count, b.count)
        count = a.count + b.count
    else:
        weights, sizes = _merged_weights(a.weights, b.weights), (a.weights.total, b.weights.total)
        count = effective_size(weights.total, weights.squares)
    p, q = _shares(*sizes)
    mean = _weighted(p, q, a.mean, b.mean)
    return GradientMoments(
        value=_weighted(p, q, a.value, b.value),
        mean=jax.tree.map(lambda x, like: x.astype(like.dtype), mean, a.mean),
        variance=_merged_variance(a, b, p, q),
        count=count,
        averaged_value=_weighted(p, q, a.averaged_value, b.averaged_value),
        weights=weights,
    )


def _shares(size: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The shares of two sizes in their sum; 0 and 0 where it is."""
    whole = (size + other).astype(jnp.float32)
    whole = jnp.where(whole == 0, 1, whole)
    return size.astype(jnp.float32) / whole, other.astype(jnp.float32) / whole


def _weighted(p: jax.Array, q: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Returns p·a + q·b in float32, and nothing of an empty batch, not even a NaN."""

    def weighted(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.where(p > 0, p * x, 0) + jnp.where(q > 0, q * y, 0)

    return jax.tree.map(weighted, a, b)


def _merged_weights(a: WeightSums, b: WeightSums) -> WeightSums:
    if a.square_mean is None or b.square_mean is None:
        raise ValueError(
            "weighted moments can be merged only with weights.square_mean, which is Σw²g/Σw² and "
            'which method="between" does not measure: use another method.'
        )
    square_mean = _weighted(*_shares(a.squares, b.squares), a.square_mean, b.square_mean)
    return WeightSums(a.total + b.total, a.squares + b.squares, square_mean)


def _merged_variance(a: GradientMoments, b: GradientMoments, p: jax.Array, q: jax.Array) -> PyTree:
    delta = _difference(b.mean, a.mean)
    squares, both = _products_like(a.variance, delta, delta), (p > 0) & (q > 0)
    if a.weights is None or b.weights is None:
        within = _weighted(p, q, a.variance, b.variance)
        return jax.tree.map(lambda v, d: v + jnp.where(both, p * q * d, 0), within, squares)

    def around(m: GradientMoments, sums: WeightSums, moved: jax.Array) -> PyTree:
        """The weighted squares around ḡ + moved·δ, which is the mean of both batches."""
        away = _products_like(m.variance, _difference(sums.square_mean, m.mean), delta)
        return jax.tree.map(
            lambda v, x, d: v + jnp.where(both, moved * (moved * d - 2 * x), 0),
            m.variance,
            away,
            squares,
        )

    shares = _shares(a.weights.squares, b.weights.squares)
    return _weighted(*shares, around(a, a.weights, q), around(b, b.weights, -p))


def _difference(tree: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), tree, other)


def _products_like(variance: PyTree, tree: PyTree, other: PyTree) -> PyTree:
    """Returns the products of the entries of two trees, summed as the variance is."""
    if jax.tree.structure(variance) != jax.tree.structure(tree):  # type: ignore[operator]
        return tree_squared_norm(tree) if tree is other else tree_dot(tree, other)

    def product(v: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return x * y if v.shape == x.shape else jnp.sum(x * y)

    return jax.tree.map(product, variance, tree, other)
