"""A rate that falls takes a coupled batch size down, which is said; the peak keeps it up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from cabs_jax import rules

STEPS, PEAK = 128, 0.1
COSINE = optax.warmup_cosine_decay_schedule(0.0, PEAK, 16, STEPS)
FALLS = r"falls from 0\.1 at step 16 to 0, and a batch size coupled to it falls too"
TRUTH = jnp.array([1.0, -2.0, 3.0])


def raw_sizes(optimizer):
    """Returns what the rule asks for at each step of a noisy linear regression."""
    moments_of = cabs_jax.gradient_moments(
        lambda w, example: 0.5 * (w @ example[0] - example[1]) ** 2, variance="diagonal"
    )

    @jax.jit
    def step(params, state, key):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (32, 3))
        moments = moments_of(params, (x, x @ TRUTH + jax.random.normal(keys[1], (32,))))
        updates, state = optimizer.update(moments.mean, state, params, moments=moments)
        return optax.apply_updates(params, updates), state

    params, sizes = jnp.zeros(3), []
    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), STEPS):
        params, state = step(params, state, key)
        sizes.append(float(cabs_jax.info(state).raw_batch_size))
    return np.array(sizes)


@pytest.mark.parametrize(
    "make",
    [
        cabs_jax.cabs,
        lambda rate: cabs_jax.cabs_adam(rate, weight_decay=1e-4),
        rules.cabs,
        lambda rate: rules.expected_progress(rate, 1.0),
        lambda rate: jax.jit(lambda: (rules.cabs(rate), 0)[1])(),
    ],
)
def test_a_schedule_that_falls_draws_one_warning(make):
    with pytest.warns(UserWarning, match=FALLS) as caught:
        make(COSINE)
    assert len(caught) == 1


def test_a_schedule_that_falls_to_less_than_half_draws_a_warning():
    with pytest.warns(UserWarning, match=r"falls from 0\.1 at step 0 to 0\.04,"):
        cabs_jax.cabs(optax.linear_schedule(0.1, 0.04, 100))


def test_with_momentum_the_rate_that_falls_is_the_effective_one():
    with pytest.warns(UserWarning, match=r"falls from 0\.2 at step 16") as caught:
        cabs_jax.cabs(COSINE, momentum=0.5)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "schedule",
    [
        optax.warmup_constant_schedule(0.0, PEAK, 16),
        optax.linear_schedule(0.1, 0.06, 100),
        optax.constant_schedule(0.0),
        lambda step: jnp.nan,
    ],
)
def test_a_schedule_that_stays_up_draws_none(schedule):
    cabs_jax.cabs(schedule)
    cabs_jax.cabs_adam(schedule)


@pytest.mark.slow  # trains twice
@pytest.mark.filterwarnings("ignore:the learning rate falls")
def test_a_size_coupled_to_warmup_cosine_falls_and_one_coupled_to_its_peak_does_not():
    coupled = raw_sizes(cabs_jax.cabs_adam(COSINE, weight_decay=1e-4))
    assert coupled[-1] < 0.01 * coupled[STEPS // 2]
    factor = optax.scale_by_schedule(lambda step: COSINE(step) / PEAK)
    peak = raw_sizes(optax.chain(cabs_jax.cabs_adam(PEAK, weight_decay=1e-4), factor))
    assert peak[-1] > 0.5 * peak[STEPS // 2]
