"""Moments by their definition, from float64 per-example gradients."""

import functools
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np

from cabs_jax import GradientMoments
from tests.cabs_jax.moments.zoo import ZOO


@functools.cache
def per_example(name):
    """Float64 losses and gradients of a case of the zoo, each with an example axis."""
    case = ZOO[name]()
    return per_example_of(case.loss, case.params, case.batch)


def per_example_of(loss, params, batch):
    """Float64 losses and gradients, each with an example axis; None for integer parameters."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, batch = jax.tree.map(_in_float64, (params, batch))
        derivative = jax.value_and_grad(loss, allow_int=True)
        losses, grads = jax.jit(jax.vmap(derivative, (None, 0)))(params, batch)
        return np.asarray(losses), jax.tree.map(_or_none, grads)


def moments(losses, grads, variance="trace", keep=None):
    """(1/m) Σ ℓ, ḡ, (1/m) Σ (g − ḡ)² and m, over the examples that are kept."""
    keep = np.ones(len(losses), bool) if keep is None else np.asarray(keep)
    grads = jax.tree.map(lambda g: g[keep], grads)
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    diagonal = jax.tree.map(lambda g: g.var(0), grads)
    by_parameter = jax.tree.map(np.sum, diagonal)
    trace = sum(jax.tree.leaves(by_parameter))
    spread = {"trace": trace, "by_parameter": by_parameter, "diagonal": diagonal}[variance]
    return GradientMoments(losses[keep].mean(), mean, spread, keep.sum())


def expected(name, variance="trace", keep=None):
    """Moments of a case of the zoo."""
    return moments(*per_example(name), variance, keep)


def assert_close(actual, wanted, tolerance=1e-4):
    """Every array of a tree agrees up to a fraction of its own largest entry; zeros exactly."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        atol = tolerance * np.max(np.abs(y), initial=0)
        np.testing.assert_allclose(x, y, 0, atol, err_msg=jax.tree_util.keystr(path))


def with_garbage(batch, keep):
    """Overwrites what is not kept with NaN, or with integers beyond all bounds."""

    def spoilt(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        garbage = np.array(np.nan if is_floating(x) else np.iinfo(x.dtype).max, x.dtype)
        return np.where(np.reshape(keep, (-1,) + (1,) * (x.ndim - 1)), x, garbage)

    return jax.tree.map(spoilt, batch)


def names(tree):
    """Paths of the leaves of a tree, such as "layer/scale"."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def matches(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


def is_floating(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _in_float64(x):
    return x.astype(np.float64) if is_floating(x) else x


def _or_none(g):
    return None if g.dtype == jax.dtypes.float0 else np.asarray(g)
