"""Gradient moments in float64, one example at a time: what the others are held against."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cabs_jax.statistics import PyTree


class Exact(NamedTuple):
    """Moments of a batch in float64.

    Attributes:
      mean: Mean gradient, numpy arrays.
      trace: (1/m) Σ‖g_i‖² − ‖ḡ‖².
      diagonal: (1/m) Σ g_i² − ḡ², numpy arrays.
    """

    mean: PyTree
    trace: float
    diagonal: PyTree


def moments(
    loss_fn: Callable[..., Any], params: PyTree, examples: PyTree, batch_sizes: Sequence[int]
) -> dict[int, Exact]:
    """Moments of the first m examples for each m of `batch_sizes`.

    No two gradients are held at once, and nothing is vectorised over examples.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)

        @partial(jax.jit, donate_argnums=0)
        def add(sums: PyTree, example: PyTree) -> PyTree:
            gradient = jax.grad(loss_fn)(params, example)
            return jax.tree.map(
                lambda s, g: (s[0] + g, s[1] + g * g), sums, gradient, is_leaf=_pair
            )

        sums = jax.tree.map(lambda p: (jnp.zeros_like(p), jnp.zeros_like(p)), params)
        exact = {}
        for index in range(max(batch_sizes)):
            sums = add(sums, jax.tree.map(lambda x, i=index: x[i], examples))
            if index + 1 in batch_sizes:
                exact[index + 1] = _of_sums(jax.device_get(sums), index + 1)
    return exact


def _of_sums(sums: PyTree, count: int) -> Exact:
    mean = jax.tree.map(lambda s: s[0] / count, sums, is_leaf=_pair)
    diagonal = jax.tree.map(lambda s: s[1] / count - (s[0] / count) ** 2, sums, is_leaf=_pair)
    return Exact(mean, sum(float(d.sum()) for d in jax.tree.leaves(diagonal)), diagonal)


def relative_error(computed: PyTree, exact: PyTree) -> float:
    """‖computed − exact‖ / ‖exact‖ over all entries of a tree."""
    pairs = list(zip(jax.tree.leaves(computed), jax.tree.leaves(exact), strict=True))
    error = sum(np.sum((np.asarray(c, np.float64) - e) ** 2) for c, e in pairs)
    return float(np.sqrt(error / sum(np.sum(np.square(e)) for _, e in pairs)))


def _pair(x: Any) -> bool:
    return type(x) is tuple
