"""The noise scale is measured without bias, and its interval holds it as often as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabs_jax import noise_scale

DECAY, DIMENSIONS = jnp.float32(0.95), 20


def measured(seed, steps, size, mean):
    """Returns the averages over batches of gradients of variance 1 around `mean` each."""
    gradients = mean + jax.random.normal(jax.random.key(seed), (steps, size, DIMENSIONS))

    def step(scale, batch):
        centre = batch.mean(0)
        trace, norm = jnp.square(batch - centre[None]).sum() / size, jnp.square(centre).sum()
        return noise_scale.advance(scale, trace, norm, jnp.int32(size), DECAY), None

    return jax.lax.scan(step, noise_scale.no_noise_scale(), gradients)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "size", "mean"),
    [
        (60, 8, 1.0),
        pytest.param(20, 32, 0.2, marks=pytest.mark.slow),
        pytest.param(300, 4, 0.5, marks=pytest.mark.exhaustive),
    ],
)
def test_nine_of_ten_intervals_hold_the_noise_scale(steps, size, mean):
    scales = jax.vmap(lambda seed: measured(seed, steps, size, mean))(jnp.arange(400))
    low, high = scales.interval(DECAY)
    truth = 1 / mean**2
    assert 0.91 < np.mean((low <= truth) & (truth <= high)) <= 0.99
    assert np.all((low <= scales.estimate()) & (scales.estimate() <= high))
    assert np.median(scales.estimate()) == pytest.approx(truth, rel=0.1)


@pytest.mark.slow
def test_what_noise_hides_may_be_infinitely_large():
    scales = jax.vmap(lambda seed: measured(seed, 60, 8, 0.0))(jnp.arange(400))
    low, high = scales.interval(DECAY)
    assert np.mean(np.isinf(high)) > 0.91
    assert np.all(low >= 0)


def test_the_averages_are_those_of_exponential_weights():
    traces, norms = np.random.default_rng(0).uniform(1, 2, (2, 7)).astype(np.float32)
    scale = noise_scale.no_noise_scale()
    for trace, norm in zip(traces, norms, strict=True):
        scale = noise_scale.advance(scale, trace, norm, jnp.int32(5), DECAY)
    weights = 0.95 ** np.arange(6, -1, -1)
    x = np.stack([traces * 5 / 4, norms - traces / 4])
    means = np.average(x, axis=1, weights=weights)
    covariance = np.cov(x, aweights=weights, ddof=0)
    np.testing.assert_allclose(scale[1:3], means, rtol=1e-5)
    expected = covariance[0, 0], covariance[1, 1], covariance[0, 1]
    np.testing.assert_allclose(scale[3:], expected, rtol=1e-4)


@pytest.mark.slow
def test_a_single_example_says_nothing():
    before = measured(0, 5, 8, 1.0)
    assert (
        noise_scale.advance(before, jnp.float32(0), jnp.float32(9), jnp.int32(1), DECAY) == before
    )
    nothing = noise_scale.no_noise_scale()
    assert nothing.estimate() == jnp.inf
    assert nothing.interval(DECAY) == (0.0, jnp.inf)


def test_one_absurd_step_is_forgotten_in_the_next():
    scale = noise_scale.advance(
        measured(0, 5, 8, 1.0), jnp.float32(1e30), jnp.float32(1e25), jnp.int32(8), DECAY
    )
    for _ in range(3):
        scale = noise_scale.advance(scale, jnp.float32(7), jnp.float32(2), jnp.int32(8), DECAY)
    assert scale.estimate() == pytest.approx(8.0)
    assert np.isfinite(scale).all()
