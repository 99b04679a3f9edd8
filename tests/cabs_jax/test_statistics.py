"""Moments from per-example gradients, in float32 whatever the model's dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cabs_jax.statistics import (
    moments_from_per_example,
    sum_over,
    tree_squared_norm,
    tree_sum,
)


def example_gradients(examples, seed=0, offset=0.0):
    random = np.random.default_rng(seed)
    grads = {"b": random.normal(size=(examples, 2)), "w": random.normal(size=(examples, 3, 4))}
    losses = random.uniform(size=examples)
    return jax.tree.map(lambda x: (x + offset).astype(np.float32), (losses, grads))


def by_definition(losses, grads, keep, variance):
    """The moments in float64."""
    grads = jax.tree.map(lambda g: np.asarray(g, np.float64)[keep], grads)
    diagonal = jax.tree.map(lambda g: g.var(0), grads)
    by_parameter = jax.tree.map(np.sum, diagonal)
    trace = sum(by_parameter.values())
    spread = {"trace": trace, "by_parameter": by_parameter, "diagonal": diagonal}[variance]
    return losses[keep].mean(), jax.tree.map(lambda g: g.mean(0), grads), spread, keep.sum()


compute = jax.jit(moments_from_per_example, static_argnames=("variance", "axis_name"))


def assert_moments(moments, wanted, rtol=1e-5):
    assert jax.tree.structure(tuple(moments[:4])) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-6), tuple(moments[:4]), wanted
    )


@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.sampled_from([0.0, 1e3]))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
def test_moments_are_those_of_what_the_mask_keeps(variance, keep, offset):
    keep = np.array(keep)
    losses, grads = example_gradients(len(keep), offset=offset)
    spoilt = jax.tree.map(
        lambda x: np.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, np.float32(np.nan)),
        (losses, grads),
    )
    moments = compute(*spoilt, jnp.asarray(keep), variance=variance)
    # Numbers near 1000 are stored to 6e-5: the mean is no better, the squares around it are.
    assert_moments(moments, by_definition(losses, grads, keep, variance), 1e-4)


def test_no_mask_keeps_everything():
    losses, grads = example_gradients(5)
    moments = compute(losses, grads)
    assert_moments(moments, by_definition(losses, grads, np.ones(5, bool), "trace"))
    assert moments.count.dtype == jnp.int32


def test_trace_is_the_sum_of_the_diagonal():
    losses, grads = example_gradients(7)
    trace = compute(losses, grads).variance
    diagonal = compute(losses, grads, variance="diagonal").variance
    np.testing.assert_allclose(tree_sum(diagonal), trace, rtol=1e-6)


@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
def test_an_empty_mask_gives_zeros(variance):
    losses, grads = jax.tree.map(lambda x: x * np.nan, example_gradients(4))
    moments = compute(losses, grads, jnp.zeros(4, bool), variance=variance)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.zeros_like(x)), moments)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gradients_have_float32_statistics(dtype):
    losses, grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), example_gradients(512, offset=1))
    moments = compute(losses, grads)
    assert moments.mean["w"].dtype == dtype
    assert moments.value.dtype == moments.variance.dtype == jnp.float32
    exact = by_definition(
        np.asarray(losses, np.float64), jax.device_get(grads), np.ones(512, bool), "trace"
    )
    np.testing.assert_allclose(moments.value, exact[0], rtol=1e-6)
    np.testing.assert_allclose(moments.variance, exact[2], rtol=1e-5)


@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
def test_a_batch_split_over_a_mapped_axis(variance):
    losses, grads = example_gradients(16)
    keep = np.arange(16) % 5 != 1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *args: moments_from_per_example(*args, variance=variance, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    moments = jax.jit(sharded)(losses, grads, jnp.asarray(keep))
    assert_moments(moments, by_definition(losses, grads, keep, variance))


def test_sums_over_trees():
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones((2, 2), jnp.bfloat16)}
    assert float(tree_squared_norm(tree)) == 29.0
    assert tree_squared_norm(tree).dtype == jnp.float32
    assert float(tree_squared_norm({})) == float(tree_sum({})) == 0.0
    assert float(tree_sum({"a": jnp.array([3.0, 4.0])})) == 7.0


def test_squared_norm_of_half_precision_does_not_overflow():
    assert float(tree_squared_norm(jnp.full(4, 256.0, jnp.float16))) == 4 * 2**16


def test_sum_over_no_axis_is_the_identity():
    tree = {"a": 1.0}
    assert sum_over(tree, None) is tree
    total = jax.vmap(lambda x: sum_over({"a": x}, "i"), axis_name="i")(jnp.arange(4.0))
    np.testing.assert_array_equal(total["a"], 6.0)
