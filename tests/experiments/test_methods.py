import jax.numpy as jnp
import optax
import pytest

import cabs_jax
from experiments import methods
from experiments.config import RunConfig

PARAMS = {"w": jnp.ones(3)}
GRADS = {"w": jnp.full(3, 2.0)}


def update(config, *, value=1.0, variance=0.0):
    optimizer = methods.build(config)
    return optimizer.update(
        GRADS,
        optimizer.init(PARAMS),
        PARAMS,
        value=jnp.float32(value),
        gradient_variance=jnp.float32(variance),
        count=jnp.int32(config.batch_size),
    )


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_every_method_takes_a_step_of_sgd_and_keeps_within_its_bounds(method):
    config = RunConfig(method=method, learning_rate=0.5, theta=0.9)
    updates, state = update(config, variance=1e6)
    assert updates["w"].tolist() == [-1.0, -1.0, -1.0]
    assert methods.learning_rate(state) == 0.5
    smallest, largest = methods.bounds(config)
    assert smallest <= cabs_jax.batch_size(state) <= largest


def test_adaptive_methods_start_at_the_given_size():
    config = RunConfig(batch_size=100)
    assert cabs_jax.batch_size(methods.build(config).init(PARAMS)) == 100


def test_constant_keeps_its_size_whatever_the_bounds():
    _, state = update(RunConfig(method="constant", batch_size=7), variance=1e6)
    assert cabs_jax.batch_size(state) == 7


def test_buckets_are_the_only_legal_sizes_when_asked_for():
    _, state = update(RunConfig(round_to="buckets"), variance=9e3)
    assert int(cabs_jax.batch_size(state)) in methods.legal_sizes(RunConfig())
    _, state = update(RunConfig(round_to=10, min_batch_size=10, max_batch_size=2000), variance=9e3)
    assert int(cabs_jax.batch_size(state)) % 10 == 0


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'sgd'; known methods: .*cabs, constant"):
        methods.build(RunConfig(method="sgd"))


def test_the_learning_rate_of_the_state_is_that_of_the_last_update():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    state = optimizer.init(jnp.zeros(2))
    rates = []
    for _ in range(3):
        _, state = optimizer.update(jnp.ones(2), state)
        rates.append(float(methods.learning_rate(state)))
    assert rates == pytest.approx([1.0, 0.1, 0.1])
