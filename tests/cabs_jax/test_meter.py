"""`monitor` changes nothing and measures; `info` finds what was measured, wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from cabs_jax import rules

PARAMS = jnp.zeros(8)


def loss_fn(params, row):
    return 0.5 * jnp.sum((params - row) ** 2)


def batch(seed, size=64):
    return 1.0 + jax.random.normal(jax.random.key(seed), (size, 8))


MOMENTS_OF = jax.jit(cabs_jax.gradient_moments(loss_fn))


def train(optimizer, steps=30, every=1):
    @jax.jit
    def step(params, state, moments, shown):
        updates, state = optimizer.update(moments.mean, state, params, moments=shown)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for k in range(steps):
        moments = MOMENTS_OF(params, batch(k))
        params, state = step(params, state, moments, None if k % every else moments)
    return params, state


WRAPPINGS = {
    "in front": lambda meter: optax.chain(meter, optax.sgd(1e-4)),
    "behind": lambda meter: optax.chain(optax.sgd(1e-4), meter),
    "deep": lambda meter: optax.apply_if_finite(
        optax.chain(optax.chain(optax.identity(), meter), optax.sgd(1e-4)), 3
    ),
    "partition": lambda meter: optax.partition(
        {"all": optax.chain(meter, optax.sgd(1e-4))}, lambda params: "all"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_meter_measures_in_any_wrapping_and_changes_nothing(wrap):
    params, state = train(wrap(cabs_jax.monitor()))
    expected, _ = train(optax.sgd(1e-4))
    np.testing.assert_allclose(params, expected, rtol=1e-6)
    info = cabs_jax.info(state)
    # A variance of 1 and a mean 1 away, in each of eight directions.
    assert info.squared_gradient_norm == pytest.approx(8, rel=0.1)
    assert info.gradient_variance == pytest.approx(8, rel=0.2)
    assert info.value == pytest.approx(8, rel=0.2)
    assert info.noise_scale_low < 1 < info.noise_scale_high
    assert info.noise_scale == pytest.approx(1, rel=0.1)
    assert info.raw_batch_size == pytest.approx(1, rel=0.1)


def test_a_meter_says_what_cabs_would_take():
    _, state = train(optax.chain(cabs_jax.monitor(rule=rules.cabs(4.0)), optax.sgd(1e-4)))
    assert cabs_jax.info(state).raw_batch_size == pytest.approx(4.0, rel=0.1)
    with pytest.raises(ValueError, match="no batch size in this state"):
        cabs_jax.batch_size(state)


@pytest.mark.slow
def test_steps_without_moments_are_counted_and_leave_the_meter_alone():
    meter = cabs_jax.monitor(rule=rules.schedule(lambda step: step))
    _, state = train(optax.chain(meter, optax.sgd(1e-4)), steps=28, every=3)
    measured = state[0].measured
    assert (measured.step, measured.info.raw_batch_size) == (28, 27)
    assert measured.weight == pytest.approx(1 - 0.95**10)
    assert measured.examples.low == 640


@pytest.mark.slow
def test_empty_batches_and_bad_numbers_leave_the_meter_alone():
    meter = cabs_jax.monitor()
    moments = MOMENTS_OF(PARAMS, batch(0))
    _, before = meter.update(moments.mean, meter.init(PARAMS), moments=moments)
    empty = moments._replace(count=jnp.int32(0))
    assert meter.update(moments.mean, before, moments=empty)[1] == before
    bad = moments._replace(mean=moments.mean * jnp.inf)
    _, after = meter.update(moments.mean, before, moments=bad)
    assert after.measured.noise_scale == before.measured.noise_scale
    assert cabs_jax.info(after).non_finite == 1
    with pytest.raises(TypeError, match="moments must be what gradient_moments returned, got dict"):
        meter.update(moments.mean, before, moments={})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"decay": 1.0}, ValueError), ({"decay": -0.1}, ValueError), ({"rule": 0.1}, TypeError)],
)
def test_bad_arguments_of_a_meter_are_shown(arguments, error):
    with pytest.raises(error, match=r"must be .*, got"):
        cabs_jax.monitor(**arguments)


@pytest.mark.slow
def test_info_is_found_in_every_optimizer():
    for optimizer in (
        cabs_jax.cabs(0.1),
        cabs_jax.cabs(0.1, momentum=0.9),
        optax.chain(cabs_jax.adapt_batch_size(rules.constant(64)), optax.adam(1e-3)),
    ):
        info = cabs_jax.info(train(optimizer, steps=3)[1])
        assert 0 < info.noise_scale_low < info.noise_scale < info.noise_scale_high
    with pytest.raises(ValueError, match="no measurement in this state of type EmptyState"):
        cabs_jax.info(optax.identity().init(PARAMS))
    twice = optax.chain(cabs_jax.monitor(), cabs_jax.cabs(0.1))
    with pytest.raises(ValueError, match="2 measurements in this state of type tuple"):
        cabs_jax.info(twice.init(PARAMS))


@pytest.mark.slow
def test_adam_reports_the_noise_scale_of_the_plain_gradient():
    adam, meter = cabs_jax.cabs_adam(1e-6), cabs_jax.monitor()
    diagonal_of = jax.jit(cabs_jax.gradient_moments(loss_fn, variance="diagonal"))
    states = adam.init(PARAMS), meter.init(PARAMS)
    for k in range(4):
        moments = diagonal_of(PARAMS, batch(k))
        states = (
            adam.update(moments.mean, states[0], PARAMS, moments=moments)[1],
            meter.update(moments.mean, states[1], PARAMS, moments=moments)[1],
        )
    # The first step of Adam has no preconditioner and is not counted.
    assert cabs_jax.info(states[0]).noise_scale == pytest.approx(1, rel=0.3)
    assert cabs_jax.info(states[1]).noise_scale == pytest.approx(1, rel=0.3)
