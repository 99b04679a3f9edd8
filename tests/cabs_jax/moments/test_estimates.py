"""What a subsample and the differences between groups say of the variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabs_jax import gradient_moments
from tests.cabs_jax.moments.oracle import assert_close, expected
from tests.cabs_jax.moments.zoo import EXAMPLES, ZOO


def linear(p, x):
    """A loss whose gradient is the example."""
    return jnp.dot(p, x)


@pytest.mark.parametrize("name", ["convolution_2d", "embedding_as_output_head", "weight_norm"])
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
def test_subsample_averaged_over_all_shifts_is_the_second_moment(name, variance):
    case = ZOO[name]()
    function = jax.jit(gradient_moments(case.loss, subsample=4, variance=variance))
    wanted = expected(name, variance)
    shifts = [functools.partial(np.roll, shift=k, axis=0) for k in range(0, EXAMPLES, 4)]
    shifted = [function(case.params, jax.tree.map(shift, case.batch)) for shift in shifts]
    for m in shifted:
        assert_close((m.value, m.mean), (wanted.value, wanted.mean), case.tolerance)
    mean = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *[m.variance for m in shifted])
    if variance == "trace":
        assert_close(mean, wanted.variance)
        return
    # Clamped at zero in some shift, an entry of the diagonal may come out larger.
    for x, y in zip(jax.tree.leaves(mean), jax.tree.leaves(wanted.variance), strict=True):
        assert np.all(x > y - 1e-4 * y.max())


def test_subsample_takes_no_more_than_there_is():
    case = ZOO["dense"]()
    measure = jax.jit(gradient_moments(case.loss, subsample=1000))
    assert_close(measure(case.params, case.batch), expected("dense"))


def test_subsample_of_padding_alone_is_unknown():
    mask = jnp.arange(4) >= 2
    m = jax.jit(gradient_moments(linear, subsample=2))(jnp.ones(3), jnp.ones((4, 3)), mask)
    assert jnp.isnan(m.variance)
    np.testing.assert_allclose(m.mean, 1)


def between(examples, keep, groups):
    """(m−1)/m · (Σ_k n_k‖ḡ_k‖² − m‖ḡ‖²)/(G−1) in float64."""
    real = [x[k] for x, k in zip(np.split(examples, groups), np.split(keep, groups), strict=True)]
    real = [x for x in real if len(x)]
    m = keep.sum()
    squares = sum(len(x) * x.mean(0) ** 2 for x in real)
    diagonal = squares - m * examples[keep].mean(0) ** 2
    return (m - 1) / m * diagonal / (len(real) - 1)


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
@pytest.mark.parametrize("real", [12, 9, 7])
def test_between_is_its_formula(groups, variance, real):
    x = np.random.default_rng(0).normal(size=(12, 3)) + 1
    keep = np.arange(12) < real
    function = gradient_moments(linear, method="between", groups=groups, variance=variance)
    padded = np.where(keep[:, None], x, np.nan).astype(np.float32)
    m = jax.jit(function)(jnp.ones(3), padded, jnp.asarray(keep))
    diagonal = between(x, keep, groups)
    wanted = diagonal if variance == "diagonal" else diagonal.sum()
    assert_close(m.variance, wanted, 1e-5)
    np.testing.assert_allclose(m.mean, x[keep].mean(0), rtol=1e-5)
    assert int(m.count) == real


def test_between_of_one_group_that_is_not_padding_is_unknown():
    function = gradient_moments(linear, method="between", groups=3)
    m = jax.jit(function)(jnp.ones(2), jnp.ones((6, 2)), jnp.arange(6) < 2)
    assert jnp.isnan(m.variance)


@pytest.mark.parametrize("groups", [2, 8])
def test_between_is_unbiased_with_the_stated_deviation(groups):
    scale = np.array([2.0, 1.0, 0.5], np.float32)
    repetitions, examples = 4000, 16
    noise = np.random.default_rng(1).normal(size=(repetitions, examples, 3))
    batches = jnp.asarray(noise * scale + 1, jnp.float32)
    function = gradient_moments(linear, method="between", groups=groups)
    estimates = jax.jit(jax.vmap(lambda b: function(jnp.ones(3), b).variance))(batches)
    covariance = scale**2
    trace = covariance.sum() * (examples - 1) / examples
    deviation = np.sqrt(2 * np.sum(covariance**2) / ((groups - 1) * covariance.sum() ** 2))
    relative = np.asarray(estimates) / trace
    assert abs(relative.mean() - 1) < 4 * deviation / np.sqrt(repetitions)
    np.testing.assert_allclose(relative.std(), deviation, rtol=0.08)
