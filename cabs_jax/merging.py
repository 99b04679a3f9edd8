"""From the moments of two batches to those of both."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cabs_jax.statistics import GradientMoments, PyTree, tree_squared_norm


def merge_moments(a: GradientMoments, b: GradientMoments) -> GradientMoments:
    """Returns the moments of two disjoint batches together, from the moments of each.

    For gradient accumulation: after the last batch, `update` is given the merged moments, with
    `count` the number of all real examples. With p and q the shares of the two batches and
    δ = ḡ_b − ḡ_a,

        ḡ = ḡ_a + q·δ,    Σ̂ = p·Σ̂_a + q·Σ̂_b + p·q·δδᵀ,

    which is exact but for the rounding of the mean gradients to their dtype. The parameters must be
    the same. Padding counts for nothing, and moments that are all zeros are those of an empty
    batch: start a `lax.scan` from them.

    Args:
      a: Moments of the one batch: of `gradient_moments`, or merged.
      b: Moments of the other, with the same kind of variance.

    Returns:
      Moments of both.

    Raises:
      ValueError: If they differ in their gradients' tree, in the kind of variance, or in whether
        they hold an `averaged_value`.

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
    count = a.count + b.count
    whole = jnp.maximum(count, 1).astype(jnp.float32)
    p, q = a.count.astype(jnp.float32) / whole, b.count.astype(jnp.float32) / whole

    def weighted(x: jax.Array, y: jax.Array) -> jax.Array:
        # Nothing of an empty batch, not even a NaN.
        return jnp.where(p > 0, p * x, 0) + jnp.where(q > 0, q * y, 0)

    def difference(x: jax.Array, y: jax.Array) -> jax.Array:
        return y.astype(jnp.float32) - x.astype(jnp.float32)

    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        return weighted(x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)

    delta = jax.tree.map(difference, a.mean, b.mean)
    return GradientMoments(
        value=weighted(a.value, b.value),
        mean=jax.tree.map(mean, a.mean, b.mean),
        variance=jax.tree.map(
            lambda x, y, squares: weighted(x, y) + jnp.where((p > 0) & (q > 0), p * q * squares, 0),
            a.variance,
            b.variance,
            _squares_like(a.variance, delta),
        ),
        count=count,
        averaged_value=(
            None
            if a.averaged_value is None or b.averaged_value is None
            else weighted(a.averaged_value, b.averaged_value)
        ),
    )


def _squares_like(variance: PyTree, delta: PyTree) -> PyTree:
    """Returns the squares of the entries of δ, summed as the variance is."""
    if jax.tree.structure(variance) != jax.tree.structure(delta):  # type: ignore[operator]
        return tree_squared_norm(delta)

    def squares(v: jax.Array, d: jax.Array) -> jax.Array:
        return jnp.square(d) if v.shape == d.shape else jnp.sum(jnp.square(d))

    return jax.tree.map(squares, variance, delta)
