"""Schedules of sizes: they need neither loss nor variance, and do what a decay would do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from cabs_jax import adapt_batch_size, batch_size, rules, scale_with_batch_size

PARAMS = jnp.zeros(3)
RUNS, DIMENSIONS, SIZE, STEPS = 400, 4, 8, 256
HALVINGS = optax.piecewise_constant_schedule(1.0, {100: 0.5, 175: 0.5})


def sizes_along(tx, steps, **extra_args):
    state, sizes = tx.init(PARAMS), []
    for _ in range(steps):
        sizes.append(int(batch_size(state)))
        _, state = tx.update(PARAMS, state, PARAMS, **extra_args)
    return sizes


def adaptive(rule, **options):
    options = {"min_batch_size": 1, "max_batch_size": 4096} | options
    return adapt_batch_size(rule, **options)


@pytest.mark.slow
def test_a_schedule_of_steps_needs_no_more_than_the_gradient():
    ramp = rules.schedule(optax.linear_schedule(10, 40, 3))
    assert sizes_along(adaptive(ramp), 5) == [1, 10, 20, 30, 40]
    assert sizes_along(adaptive(ramp), 5, value=2.5) == [1, 10, 20, 30, 40]
    state = adaptive(ramp).init(PARAMS)
    updates, state = adaptive(ramp).update(jnp.full(3, jnp.nan), state, PARAMS)
    assert np.isnan(updates).all()
    assert (batch_size(state), state.info.non_finite, state.step) == (1, 1, 1)


def test_a_schedule_of_examples_counts_them():
    rule = rules.schedule([(0, 20), (50, 30), (2**31, 40)])
    tx = adaptive(rule, initial_batch_size=20)
    assert sizes_along(tx, 4, count=25) == [20, 20, 30, 30]
    state = tx.init(PARAMS)
    for count in (2**31 - 1, 0, 100):
        _, state = tx.update(PARAMS, state, PARAMS, count=jnp.int32(count))
    assert batch_size(state) == 40


@pytest.mark.parametrize("rule", [rules.schedule([(0, 20)]), rules.seesaw(HALVINGS, 16)])
def test_a_rule_that_counts_examples_says_so(rule):
    with pytest.raises(ValueError, match=r"counts examples: pass count= or moments=.*count=None"):
        sizes_along(adaptive(rule), 1)


@pytest.mark.parametrize(
    "tx",
    [cabs_jax.cabs(0.1), cabs_jax.cabs(0.1, momentum=0.9), cabs_jax.cabs_adam(0.1)],
    ids=["plain", "momentum", "adam"],
)
def test_rules_that_need_loss_or_variance_say_so(tx):
    with pytest.raises(ValueError, match=r"update got (value|gradient_variance)=None"):
        sizes_along(tx, 1)
    with pytest.raises(ValueError, match="update got gradient_variance=None"):
        sizes_along(tx, 1, value=1.0)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([], ValueError, r"must start with \(0, size\)"),
        ([(1, 16)], ValueError, r"must start with \(0, size\).*got \[\(1, 16\)\]"),
        ([(0, 16), (9, 32), (9, 64)], ValueError, "increasing examples"),
        ([(0, 0)], ValueError, r"each size must lie in \[1, 2\*\*31 - 1\], got 0"),
        ([16, 32], TypeError, r"pairs \(examples, size\).*got \[16, 32\]"),
        ([(0, 16), (1e6, 32)], TypeError, "pairs"),
    ],
)
def test_bad_pairs_are_shown(sizes, error, message):
    with pytest.raises(error, match=message):
        rules.schedule(sizes)


@pytest.mark.slow
def test_seesaw_takes_the_schedule_at_the_step_of_the_run_it_replaces():
    warm = optax.warmup_cosine_decay_schedule(0.0, 2.0, 3, 9)
    rule = rules.seesaw(warm, 16, warmup_steps=3)
    tx = adaptive(rule, initial_batch_size=16)
    assert sizes_along(tx, 5, count=16) == [16, 16, 16, 16, round(16 * 2 / float(warm(4)))]
    assert sizes_along(tx, 3, count=16 * 5)[1:] == [round(16 * 2 / float(warm(5))), 4096]


def test_bad_arguments_of_seesaw_are_shown():
    with pytest.raises(TypeError, match=r"must be a schedule, got 0\.1"):
        rules.seesaw(0.1, 16)
    with pytest.raises(ValueError, match=r"batch_size must lie in .*, got 0"):
        rules.seesaw(HALVINGS, 0)
    with pytest.raises(ValueError, match="warmup_steps must be non-negative, got -1"):
        rules.seesaw(HALVINGS, 16, warmup_steps=-1)


def noisy_regression(tx, adaptive_size):
    """Returns the excess risk after a number of examples, averaged over runs, and the steps."""
    truth = jnp.ones(DIMENSIONS)

    @jax.jit(static_argnums=3)
    def step(w, state, key, size):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (RUNS, size, DIMENSIONS))
        error = x @ truth - jnp.einsum("rmd,rd->rm", x, w)
        error += jax.random.normal(keys[1], (RUNS, size))
        gradient = -jnp.einsum("rm,rmd->rd", error, x) / size
        updates, state = tx.update(gradient, state, w, count=size)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros((RUNS, DIMENSIONS))
    state, seen, steps = tx.init(w), 0, 0
    while seen < SIZE * STEPS:
        size = int(batch_size(state)) if adaptive_size else SIZE
        w, state = step(w, state, jax.random.fold_in(jax.random.key(0), steps), size)
        seen, steps = seen + size, steps + 1
    return float(jnp.square(w - truth[None]).sum(1).mean()), steps


def decayed(rate):
    return lambda step: rate * HALVINGS(step)


SEESAW = adapt_batch_size(rules.seesaw(HALVINGS, SIZE), min_batch_size=SIZE)
HALVED_STEPS = 100 + 75 // 2 + (STEPS - 175) // 4


@pytest.mark.exhaustive  # trains three times, as Adam does below
def test_gradient_descent_with_seesaw_ends_where_the_decay_it_replaces_does():
    decay, steps = noisy_regression(optax.sgd(decayed(0.1)), adaptive_size=False)
    seesaw, fewer = noisy_regression(optax.chain(SEESAW, optax.sgd(0.1)), adaptive_size=True)
    constant, _ = noisy_regression(optax.sgd(0.1), adaptive_size=False)
    assert steps == STEPS
    assert abs(fewer - HALVED_STEPS) <= 1
    assert seesaw == pytest.approx(decay, rel=0.15)
    assert constant > 3 * decay


@pytest.mark.slow  # trains three times
def test_adam_with_seesaw_ends_where_the_decay_it_replaces_does():
    def adam(rate):
        return optax.adam(rate, b1=0.0, b2=0.8)  # forgets the smaller batches in a few steps

    decay, _ = noisy_regression(adam(decayed(0.05)), adaptive_size=False)
    scaled = optax.chain(SEESAW, adam(0.05), scale_with_batch_size(-0.5, reference=SIZE))
    seesaw, fewer = noisy_regression(scaled, adaptive_size=True)
    unscaled, _ = noisy_regression(optax.chain(SEESAW, adam(0.05)), adaptive_size=True)
    assert abs(fewer - HALVED_STEPS) <= 1
    assert seesaw == pytest.approx(decay, rel=0.15)
    assert unscaled > 1.6 * decay


@pytest.mark.parametrize(("power", "factor"), [(0.5, 2.0), (1, 4.0), (0, 1.0), (-0.5, 0.5)])
def test_steps_scale_with_a_power_of_the_batch_size(power, factor):
    tx = scale_with_batch_size(power, reference=64)
    updates = {"w": jnp.ones(3), "half": jnp.ones(2, jnp.bfloat16)}
    scaled, _ = tx.update(updates, tx.init(updates), count=256)
    assert scaled["half"].dtype == jnp.bfloat16
    jax.tree.map(lambda u: np.testing.assert_allclose(u, factor, rtol=1e-6), scaled)
    moments = cabs_jax.GradientMoments(jnp.float32(1), updates, jnp.float32(1), jnp.int32(256))
    same, _ = tx.update(updates, tx.init(updates), moments=moments)
    jax.tree.map(np.testing.assert_array_equal, scaled, same)
    one, _ = tx.update(updates, tx.init(updates), count=1)
    np.testing.assert_allclose(one["w"], 64.0**-power, rtol=1e-6)
    empty, _ = tx.update(updates, tx.init(updates), count=jnp.int32(0))
    assert np.isfinite(empty["w"]).all()


def test_bad_arguments_of_the_scaling_are_shown():
    with pytest.raises(ValueError, match="power must be a finite number, got inf"):
        scale_with_batch_size(float("inf"))
    with pytest.raises(ValueError, match=r"reference must lie in .*, got 0"):
        scale_with_batch_size(reference=0)
    tx = scale_with_batch_size()
    with pytest.raises(ValueError, match="pass moments= or count= to update, got count=None"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"count must be an integer scalar, got dtype float32"):
        tx.update(PARAMS, tx.init(PARAMS), count=2.5)
