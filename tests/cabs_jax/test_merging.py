"""Moments of parts, merged, are those of the whole."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs_jax
from cabs_jax import merge_moments

PARAMS = {"b": jnp.float32(0.5), "w": jnp.array([1.0, -2.0, 0.5])}
AVERAGED = {"b": jnp.float32(0.4), "w": jnp.array([1.1, -1.9, 0.5])}
X = 2.0 + jax.random.normal(jax.random.key(0), (24, 3))
MASK = jnp.arange(24) % 5 != 1
WEIGHTS = jax.random.randint(jax.random.key(1), (24,), 0, 9).astype(jnp.float32)
# Sizes 7, 1, 0, 16.
CUTS = (0, 7, 8, 8, 24)


def loss_fn(params, x):
    return 0.5 * jnp.sum((params["w"] - x) ** 2) + params["b"] * x[0]


def check_merged(moments_of, order, **given):
    """The moments of the whole, padded batch are those of its parts, one of them empty, merged.

    Weights are cut like the batch.
    """

    def of(a, b, mask=MASK):
        cut = {k: v[a:b] if k == "weights" else v for k, v in given.items()}
        return moments_of(PARAMS, X[a:b], mask[a:b], **cut)

    whole, empty = of(0, len(X)), of(0, len(X), MASK & False)
    parts = [of(a, b) if a < b else empty for a, b in itertools.pairwise(CUTS)]
    with jax.numpy_dtype_promotion("strict"):
        merged = functools.reduce(merge_moments, parts[::order]), merge_moments(empty, empty)
    assert_same(merged, (whole, empty))


def assert_same(actual, expected, rtol=1e-4):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol), actual, expected)


@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
@pytest.mark.parametrize("order", [1, -1])
def test_merged_moments_are_those_of_the_whole_masked_batch(variance, order):
    moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn, variance=variance))
    check_merged(moments_of, order, averaged_params=AVERAGED)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
@pytest.mark.parametrize("order", [1, -1])
def test_merged_weighted_moments_are_those_of_the_whole_batch(variance, order):
    moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn, variance=variance))
    check_merged(moments_of, order, weights=WEIGHTS)


@pytest.mark.slow
def test_weighted_moments_are_merged_in_a_scan():
    moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn, variance="diagonal"))
    batches, weights = X.reshape(4, 6, 3), WEIGHTS.reshape(4, 6).at[2].set(0)
    empty = jax.tree.map(jnp.zeros_like, moments_of(PARAMS, batches[0], weights=weights[0]))

    @jax.jit
    def accumulate(batches, weights):
        def add(merged, part):
            return merge_moments(merged, moments_of(PARAMS, part[0], weights=part[1])), None

        return jax.lax.scan(add, empty, (batches, weights))[0]

    with jax.debug_nans(True):
        merged = accumulate(batches, weights)
    assert_same(merged, moments_of(PARAMS, X, weights=weights.reshape(24)))
    assert merged.count.dtype == jnp.int32


@pytest.mark.slow
def test_equal_weights_merge_as_none_do():
    moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn))
    parts = [(X[:7], MASK[:7]), (X[7:], MASK[7:])]
    plain = merge_moments(*(moments_of(PARAMS, *part) for part in parts))
    equal = merge_moments(
        *(moments_of(PARAMS, *part, weights=jnp.full(len(part[0]), 3.0)) for part in parts)
    )
    assert_same(equal._replace(weights=None), plain)


@pytest.mark.slow
def test_weighted_moments_that_lack_what_merging_needs_are_refused():
    moments_of = cabs_jax.gradient_moments(loss_fn, method="between", groups=2)
    between = moments_of(PARAMS, X, weights=WEIGHTS)
    with pytest.raises(ValueError, match=r"can be merged only with weights\.square_mean"):
        merge_moments(between, between)
    with pytest.raises(ValueError, match="of one kind, but their weights"):
        merge_moments(between, moments_of(PARAMS, X))


@pytest.mark.slow
def test_merging_is_the_same_in_a_scan():
    moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn))
    batches, masks = X.reshape(4, 6, 3), MASK.reshape(4, 6).at[0].set(False)
    empty = jax.tree.map(jnp.zeros_like, moments_of(PARAMS, batches[0]))

    @jax.jit
    def accumulate(batches, masks):
        def add(merged, part):
            return merge_moments(merged, moments_of(PARAMS, *part)), None

        return jax.lax.scan(add, empty, (batches, masks))[0]

    with jax.debug_nans(True):
        merged = accumulate(batches, masks)
    assert_same(merged, moments_of(PARAMS, X, masks.reshape(24)))
    assert merged.count.dtype == jnp.int32


def test_the_variance_between_batches_is_not_lost():
    moments_of = jax.jit(cabs_jax.gradient_moments(lambda w, x: w * x))
    one, other = (moments_of(jnp.float32(1), jnp.full(4, x)) for x in (1.0, 3.0))
    merged = merge_moments(one, other)
    assert (merged.mean, merged.variance, merged.count) == (2.0, 1.0, 8)


@pytest.mark.slow
def test_nothing_of_an_empty_batch_is_merged_and_dtypes_are_kept():
    moments = cabs_jax.gradient_moments(lambda w, x: (w * x).sum())(
        jnp.ones(3, jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
    )
    bad = jax.tree.map(lambda x: x * jnp.nan, moments)._replace(count=jnp.int32(0))
    for merged in (merge_moments(moments, bad), merge_moments(bad, moments)):
        assert merged.mean.dtype == jnp.bfloat16
        assert_same(merged, moments)


def test_moments_of_two_kinds_are_shown():
    trace, diagonal = (
        jax.jit(cabs_jax.gradient_moments(loss_fn, variance=variance))(PARAMS, X)
        for variance in ("trace", "diagonal")
    )
    with pytest.raises(ValueError, match="of one kind, but their variance has the shapes"):
        merge_moments(trace, diagonal)
    with pytest.raises(ValueError, match="of one kind, but their averaged_value"):
        merge_moments(trace, trace._replace(averaged_value=trace.value))
    with pytest.raises(ValueError, match="of one kind, but their mean"):
        merge_moments(trace, trace._replace(mean=PARAMS["w"]))
