"""What a rule sees of a gradient that was rescaled, or made something else of, on its way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from cabs_jax import rules

TRUTH = jnp.array([1.0, -2.0, 3.0, 0.5])
PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
OPTIONS = {"min_batch_size": 32, "max_batch_size": 32}


def loss_fn(params, example):
    x, y = example
    return 0.5 * (jnp.concatenate([params["a"], params["b"]]) @ x - y) ** 2 + 0.1


def batch(seed):
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (32, 4))
    return x, x @ TRUTH + jax.random.normal(keys[1], (32,))


def train(optimizer, steps, variance="trace"):
    """Returns the last parameters and the state after each step."""
    moments_of = cabs_jax.gradient_moments(loss_fn, variance=variance)

    @jax.jit
    def step(params, state, examples):
        moments = moments_of(params, examples)
        updates, state = optimizer.update(moments.mean, state, params, moments=moments)
        return optax.apply_updates(params, updates), state

    params, state, states = PARAMS, optimizer.init(PARAMS), []
    for k in range(steps):
        params, state = step(params, state, batch(k))
        states.append(state)
    return params, states


def raw_sizes(states):
    return np.array([cabs_jax.info(state).raw_batch_size for state in states])


def adam_sizes(*before):
    optimizer = optax.chain(*before, cabs_jax.cabs_adam(0.003, eps=1e-12, **OPTIONS))
    return raw_sizes(train(optimizer, 120, "diagonal")[1])


@pytest.mark.slow  # trains twice
@pytest.mark.parametrize("clip", [0.1, 0.01])
def test_clipping_before_adam_asks_for_the_size_of_the_unclipped_run(clip):
    ratio = adam_sizes(optax.clip_by_global_norm(clip))[20:] / adam_sizes()[20:]
    assert np.all((ratio > 1 / 1.5) & (ratio < 1.5))


@pytest.mark.slow
def test_a_constant_scale_changes_no_size_of_adam():
    scaled = adam_sizes(optax.scale(0.01))
    np.testing.assert_allclose(scaled, adam_sizes(), rtol=1e-4)


@pytest.mark.slow  # trains twice
@pytest.mark.parametrize("rule", [rules.cabs, lambda rate: rules.expected_progress(rate, 0.4)])
def test_a_rescaled_gradient_is_a_rescaled_learning_rate(rule):
    def chained(scale, rate, rule_rate):
        adapt = cabs_jax.adapt_batch_size(rule(rule_rate), **OPTIONS)
        return optax.chain(optax.scale(scale), adapt, optax.scale_by_learning_rate(rate))

    params, states = train(chained(0.1, 0.5, 0.5), 30)
    expected_params, expected = train(chained(1.0, 0.05, 0.05), 30)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), params, expected_params)
    np.testing.assert_allclose(raw_sizes(states), raw_sizes(expected), rtol=1e-4)


@pytest.mark.slow
def test_a_clipped_run_takes_the_size_of_its_smaller_steps():
    clipped = optax.chain(optax.clip_by_global_norm(0.1), cabs_jax.cabs(0.01, **OPTIONS))
    _, states = train(clipped, 10)
    infos = [cabs_jax.info(state) for state in states]
    norms = np.array([info.mean_gradient_squared_norm for info in infos]) ** 0.5
    np.testing.assert_allclose([info.gradient_scale for info in infos], 0.1 / norms, rtol=1e-3)
    scale = np.average(0.1 / norms, weights=0.95 ** np.arange(9, -1, -1))
    ours = states[-1][1]
    expected = 0.01 * scale * ours.gradient_variance_average / ours.value_average
    assert raw_sizes(states)[-1] == pytest.approx(float(expected), rel=1e-3)
    assert not any(info.altered for info in infos)


@pytest.mark.slow
def test_norms_that_rules_see_are_those_of_the_gradient_as_measured():
    adapt = cabs_jax.adapt_batch_size(rules.noise_scale(), **OPTIONS)
    scaled = optax.chain(optax.scale(0.01), adapt, optax.scale_by_learning_rate(0.5))
    plain = optax.chain(adapt, optax.scale_by_learning_rate(0.005))
    sizes = raw_sizes(train(scaled, 10)[1])
    np.testing.assert_allclose(sizes, raw_sizes(train(plain, 10)[1]), rtol=1e-4)


ALTERING = {
    "sign": optax.scale_by_sign(),
    "of each entry": optax.clip(0.01),
    "projection": optax.stateless(lambda g, _: g | {"a": jnp.zeros(2)}),
    "ascent": optax.scale(-1.0),
    "momentum": optax.trace(0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("before", ALTERING.values(), ids=ALTERING)
def test_what_is_no_rescaling_is_flagged_and_leaves_the_scale_alone(before):
    _, states = train(optax.chain(before, cabs_jax.cabs(0.01, **OPTIONS)), 3)
    assert cabs_jax.info(states[-1]).altered == 1
    assert states[-1][1].gradient_scale_average == pytest.approx(1.0)


@pytest.mark.slow
def test_the_average_of_micro_steps_is_flagged():
    optimizer = optax.MultiSteps(cabs_jax.cabs(0.01, **OPTIONS), 4).gradient_transformation()
    _, states = train(optimizer, 4)
    assert cabs_jax.info(states[-1]).altered == 1


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
def test_leaves_that_are_masked_are_not_compared(variance):
    ours = optax.chain(optax.scale(0.5), cabs_jax.cabs(0.01, **OPTIONS))
    parts = {"ours": ours, "theirs": optax.scale_by_sign()}
    optimizer = optax.partition(parts, {"a": "theirs", "b": "ours"})
    _, states = train(optimizer, 2, variance)
    info = cabs_jax.info(states[-1])
    assert (info.gradient_scale, info.altered) == (pytest.approx(0.5), 0)


@pytest.mark.slow
def test_a_partition_takes_the_variance_of_its_own_leaves_where_it_is_told_by_parameter():
    parts = {"ours": cabs_jax.cabs(0.01, **OPTIONS), "theirs": optax.set_to_zero()}
    optimizer = optax.partition(parts, {"a": "theirs", "b": "ours"})
    measure = cabs_jax.gradient_moments(loss_fn, variance="by_parameter")
    variance = measure(PARAMS, batch(0)).variance
    whole = train(cabs_jax.cabs(0.01, **OPTIONS), 1, "by_parameter")[1][0]
    part = train(optimizer, 1, "by_parameter")[1][0]
    assert cabs_jax.info(whole).gradient_variance == pytest.approx(sum(variance.values()))
    assert cabs_jax.info(part).gradient_variance == pytest.approx(variance["b"])


@pytest.mark.slow
def test_adam_in_a_partition_takes_the_diagonal_of_its_own_leaves():
    def partitioned(rate):
        parts = {"ours": cabs_jax.cabs_adam(rate, **OPTIONS), "theirs": optax.set_to_zero()}
        return optax.partition(parts, {"a": "theirs", "b": "ours"})

    _, states = train(partitioned(0.01), 4, "diagonal")
    assert (
        0 < raw_sizes(states)[-1] < raw_sizes(train(cabs_jax.cabs_adam(0.01), 4, "diagonal")[1])[-1]
    )


def test_small_gradients_are_rescaled_as_large_ones_are():
    optimizer = cabs_jax.cabs(0.01)
    moments = cabs_jax.gradient_moments(lambda p, e: 1e-4 * loss_fn(p, e))(PARAMS, batch(0))
    seen = jax.tree.map(lambda g: 0.3 * g, moments.mean)
    _, state = optimizer.update(seen, optimizer.init(PARAMS), PARAMS, moments=moments)
    assert (state.info.gradient_scale, state.info.altered) == (pytest.approx(0.3), 0)


def test_bfloat16_rounding_is_no_alteration_and_no_gradient_no_rescaling():
    optimizer = cabs_jax.cabs(0.01)
    moments = cabs_jax.gradient_moments(loss_fn)(PARAMS, batch(0))
    rounded = jax.tree.map(lambda g: (0.3 * g).astype(jnp.bfloat16), moments.mean)
    _, state = optimizer.update(rounded, optimizer.init(PARAMS), PARAMS, moments=moments)
    assert (state.info.gradient_scale, state.info.altered) == (pytest.approx(0.3, rel=0.01), 0)
    nothing = moments._replace(mean=PARAMS)
    _, state = optimizer.update({**PARAMS}, optimizer.init(PARAMS), PARAMS, moments=nothing)
    assert (state.info.gradient_scale, state.info.altered) == (1.0, 0)


@pytest.mark.slow
def test_moments_of_another_tree_are_shown():
    optimizer = cabs_jax.cabs(0.01)
    moments = cabs_jax.gradient_moments(loss_fn)(PARAMS, batch(0))._replace(mean=jnp.zeros(4))
    with pytest.raises(ValueError, match=r"moments.mean must be a tree like the gradients"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, moments=moments)
