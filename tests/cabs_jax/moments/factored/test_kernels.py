"""Kernels, interpreted, against sums and norms in float64; compiled in `bench tpu`.

Where a kernel is called by itself, the interpreter has a TPU's memories: reading beyond an array
raises, and what nobody wrote is NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cabs_jax import explain, gradient_moments
from cabs_jax.moments.factored import cost, kernels
from cabs_jax.moments.factored.kernels import dense, filters
from cabs_jax.moments.factored.primitives import find_rule
from tests.cabs_jax.moments.oracle import (
    assert_close,
    expected,
    moments,
    per_example_of,
    with_garbage,
)
from tests.cabs_jax.moments.zoo import ZOO

MEMORIES = pltpu.InterpretParams()
HIGHEST = lax.Precision.HIGHEST
dtypes = st.sampled_from(["float32", "bfloat16"])


def check(left, right, total, norms):
    """Factors (examples, groups, positions, p or q) of what a kernel summed up and measured."""
    g = np.einsum("mktp,mktq->mkpq", np.float64(left), np.float64(right))
    np.testing.assert_allclose(total, g.sum(0), 0, 1e-5 * np.abs(g).sum(0).max())
    np.testing.assert_allclose(norms, np.square(g).sum((1, 2, 3)), 1e-5, 1e-6)


def random(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def site_of(function, x, parameter):
    """The only equation of a function of an example and a parameter, and the rule of its site."""
    (equation,) = jax.make_jaxpr(function)(x, parameter).eqns
    return equation, find_rule(equation, 1)


@pytest.mark.slow
@settings(max_examples=3)
@given(st.integers(1, 5), st.integers(1, 2), st.integers(1, 7), st.integers(1, 9), dtypes, dtypes)
def test_weight_gradients_of_any_shape_and_dtype(examples, groups, positions, p, dtype, other):
    left = random(0, (examples, groups, positions, p), dtype)
    right = random(1, (examples, groups, positions, 5), other)
    check(left, right, *dense.weight_gradient(left, right, HIGHEST, interpret=MEMORIES))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 11, 3, 9), (1, 2, 11, 9, 12)])
def test_what_lies_beyond_the_edges_of_tiles_is_left_out(shape, monkeypatch):
    for name, size in {"LARGEST": (4, 4, 8), "LANES": 4, "SUBLANES": 2}.items():
        monkeypatch.setattr(dense, name, size)
    examples, groups, positions, p, q = shape
    cut = dense.tiles(examples, positions, p, q)
    assert positions % cut.positions
    assert q % cut.q
    left, right = random(0, (examples, groups, positions, p)), random(1, (*shape[:3], q))
    check(left, right, *dense.weight_gradient(left, right, HIGHEST, interpret=MEMORIES))


def convolution_of(x, filters, padding, dilation):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, filters, (1, 1), padding, rhs_dilation=dilation, dimension_numbers=numbers
    )


@st.composite
def geometries(draw):
    """Shapes of an image and a filter, padding and dilation, with strides of 1."""

    def pair(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * 2))

    image, kernel, dilation = pair(1, 6), pair(1, 3), pair(1, 2)
    padding = draw(
        st.sampled_from(["SAME", "VALID", (pair(-1, 2), pair(-1, 2))]),
    )
    channels, filters = pair(1, 3)
    x, w = (1, *image, channels), (*kernel, channels, filters)
    if not isinstance(padding, str):
        assume(all(n + min(sides) > 0 for n, sides in zip(image, padding, strict=True)))
    out = jax.eval_shape(
        lambda x, w: convolution_of(x, w, padding, dilation), jnp.zeros(x), jnp.zeros(w)
    )
    assume(out.size)
    return x, w, padding, dilation


@pytest.mark.slow
@settings(max_examples=3)
@given(geometries(), dtypes)
def test_filter_gradients_of_any_geometry_and_dtype(geometry, dtype):
    x_shape, w_shape, padding, dilation = geometry

    def convolve(x, w):
        return convolution_of(x, w, padding, dilation)

    equation, rule = site_of(convolve, jnp.zeros(x_shape, dtype), jnp.zeros(w_shape, dtype))
    x = random(0, (3, *x_shape), dtype)
    cotangent = random(1, (3, *equation.outvars[0].aval.shape), dtype)
    found = filters.filter_gradient(equation, x, cotangent, HIGHEST, interpret=MEMORIES)
    check(*rule.factors(x, cotangent), *found)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"feature_group_count": 2},
    ],
)
def test_other_convolutions_are_measured_without_a_kernel(options):
    options = {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)]} | options
    channels = 2 // options.get("feature_group_count", 1)
    x, w = jnp.zeros((1, 2, 4, 4)), jnp.zeros((2, channels, 3, 3))
    assert not kernels.covered(
        *site_of(lambda x, w: lax.conv_general_dilated(x, w, **options), x, w)
    )


def test_other_dtypes_are_measured_without_a_kernel():
    def covered(dtype):
        x, w = jnp.zeros((8, 4, 3), dtype), jnp.zeros((3, 2), dtype)
        return kernels.covered(*site_of(jnp.matmul, x, w))

    assert covered("float32")
    assert not covered("float16")


def two_layers(params, example):
    """A convolution and a dense layer of several positions, as kernels measure them."""
    x, targets = example
    images = convolution_of(x[None], params["filters"], "SAME", (1, 1))[0]
    out = jnp.tanh(images.reshape(-1, images.shape[2])) @ params["w"]
    return jnp.mean(jnp.square(out - targets[None]))


PARAMS = {"filters": random(2, (3, 3, 2, 3)), "w": random(3, (3, 2))}
BATCH = random(4, (8, 4, 4, 2)), random(5, (8, 2))


def measured(params=PARAMS, batch=BATCH, mask=None, **options):
    measure = gradient_moments(two_layers, platform="tpu", kernels="interpret", **options)
    with jax.default_matmul_precision("highest"):
        return jax.jit(measure)(params, batch, mask)


def wanted(keep=None):
    return moments(*per_example_of(two_layers, PARAMS, BATCH), keep=keep)


def test_kernels_are_what_measures_the_sites_they_cover():
    measure = gradient_moments(two_layers, platform="tpu", kernels="interpret")
    text = str(jax.make_jaxpr(measure)(PARAMS, BATCH))
    assert "name=filter_gradient" in text
    assert "name=weight_gradient" in text
    without = jax.make_jaxpr(gradient_moments(two_layers, platform="tpu"))(PARAMS, BATCH)
    assert "pallas_call" not in str(without)


def test_the_table_of_prices_names_them():
    def forms(**options):
        rows = explain(two_layers, PARAMS, jax.tree.map(lambda x: x[0], BATCH), **options)
        return {row.form for row in rows}

    assert forms(platform="tpu", kernels=True) == {"kernel"}
    assert "kernel" not in forms(platform="tpu")
    assert "kernel" not in forms(platform="tpu", kernels=True, variance="diagonal")
    with pytest.raises(ValueError, match="for TPUs"):
        forms(kernels=True)


@pytest.mark.slow
def test_moments_under_a_mask():
    keep = np.arange(8) < 5
    assert_close(measured(batch=with_garbage(BATCH, keep), mask=keep), wanted(keep))


@pytest.mark.slow
def test_moments_in_microbatches():
    assert_close(measured(microbatch_size=4), wanted())


@pytest.mark.slow
def test_moments_on_a_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    assert_close(measured(mesh=mesh), wanted())


@pytest.mark.slow
def test_moments_inside_the_users_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    measure = gradient_moments(two_layers, platform="tpu", kernels="interpret", axis_name="data")
    mapped = jax.shard_map(
        measure, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(mapped)(PARAMS, BATCH), wanted())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolution_2d", "channels_first_convolution", "scan_over_time"])
def test_cases_of_the_zoo(name):
    case = ZOO[name]()
    with jax.default_matmul_precision("highest"):
        measure = gradient_moments(case.loss, platform="tpu", kernels="interpret")
        assert_close(jax.jit(measure)(case.params, case.batch), expected(name))


def test_kernels_are_refused_where_there_are_none():
    with pytest.raises(
        ValueError, match="kernels=True is for TPUs, and this is compiled for 'cpu'"
    ):
        gradient_moments(two_layers, kernels=True)(PARAMS, BATCH)


def test_kernels_are_refused_where_the_compiler_would_split_them():
    with pytest.raises(ValueError, match="cannot be split by the compiler"):
        gradient_moments(two_layers, kernels="interpret")(PARAMS, BATCH)


def test_short_products_of_large_matrices_are_left_to_the_gram_form():
    assert not cost.prefers_kernel((1, 2, 1024, 1024))
