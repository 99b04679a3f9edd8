"""Moments that are extreme, not finite or of nothing: no state that a step leaves is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabs_jax import adapt_batch_size, cabs, rules
from tests.cabs_jax.steps import (
    ALPHA,
    PARAMS,
    after_one_step,
    assert_states_equal,
    random_batch,
    update_with_moments,
)


@pytest.mark.parametrize(
    ("moments", "size"),
    [
        ({"value": 0.0, "variance": 1.0}, 2048),
        ({"value": -1.0, "variance": 1.0}, 2048),
        ({"value": 1.0, "variance": 0.0}, 16),
        ({"value": 0.0, "variance": 0.0}, 16),
        ({"value": 1e-30, "variance": 1e30}, 2048),
        ({"value": 1e30, "variance": 1e-30}, 16),
    ],
)
def test_extreme_statistics_give_a_bound(moments, size):
    tx = cabs(0.1, decay=0.0, initial_batch_size=100)
    assert after_one_step(tx, **moments).batch_size == size


@pytest.mark.slow
def test_zero_learning_rate_gives_the_minimum_and_no_step():
    tx = cabs(0.0, decay=0.0, initial_batch_size=100)
    updates, state = update_with_moments(tx, tx.init(0.0), variance=9.0, gradient=2.0)
    assert state.batch_size == 16
    assert updates == 0.0


def test_int32_never_overflows():
    tx = cabs(1e30, decay=0.0, max_batch_size=2**31 - 1)
    assert after_one_step(tx, variance=1e30).batch_size == 2**31 - 1
    full = cabs(0.1).init(0.0)._replace(step=jnp.int32(2**31 - 1))
    assert update_with_moments(cabs(0.1), full)[1].step == 2**31 - 1


HOSTILE = {
    "loss nan": ("value", jnp.nan),
    "loss inf": ("value", jnp.inf),
    "gradient nan": ("gradient", jnp.nan),
    "gradient -inf": ("gradient", -jnp.inf),
    "variance nan": ("variance", jnp.nan),
    "variance inf": ("variance", jnp.inf),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("count", [None, 8])
def test_non_finite_moments_change_neither_averages_nor_batch_size(case, count):
    tx = cabs(1.0, decay=0.5, min_batch_size=1)
    before = after_one_step(tx, value=1.0, variance=40.0, gradient=2.0, count=count)
    assert before.batch_size == 20
    name, number = HOSTILE[case]
    hostile = {"value": 3.0, "variance": 4.0, "gradient": 5.0, "count": count, name: number}
    updates, after = update_with_moments(tx, before, **hostile)
    np.testing.assert_array_equal(updates, -hostile["gradient"])
    assert after.step == 2
    assert after[1:6] == before[1:6]
    assert after.info.non_finite == 1
    assert after.info.raw_batch_size == before.info.raw_batch_size == 20.0
    assert after.info.bound == before.info.bound
    np.testing.assert_array_equal(after.info.value, np.float32(hostile["value"]))
    np.testing.assert_array_equal(after.info.gradient_variance, np.float32(hostile["variance"]))
    _, healed = update_with_moments(tx, after, value=1.0, variance=40.0)
    assert healed.info.non_finite == 0
    assert healed.batch_size == 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_single_non_finite_example_counts(number, where):
    losses, grads = random_batch(3)
    tx = cabs(ALPHA)
    before = tx.init(PARAMS)
    if where == "loss":
        losses = losses.at[2].set(number)
    else:
        grads["w"] = grads["w"].at[2, 1].set(number)
    updates, after = tx.update(grads, before, PARAMS, value=losses)
    assert after[1:6] == before[1:6]
    assert after.info.non_finite == 1
    assert bool(jnp.isfinite(updates["w"][1])) == (where == "loss")
    np.testing.assert_allclose(updates["b"], -ALPHA * grads["b"].mean(0), rtol=1e-5)


def test_rule_that_answers_nan_leaves_the_size_and_is_flagged():
    tx = adapt_batch_size(lambda _: jnp.nan, initial_batch_size=100, decay=0.5)
    state = after_one_step(tx, value=3.0)
    assert state.batch_size == 100
    assert state.info.non_finite == 1
    assert state.value_average == 2.0


@pytest.mark.slow
def test_empty_batch_changes_nothing():
    tx = cabs(ALPHA)
    losses, grads = random_batch(4)
    _, before = tx.update(grads, tx.init(PARAMS), PARAMS, value=losses)
    empty = jnp.zeros(6, bool)
    for mask_filler in (1.0, jnp.nan):
        filled = jax.tree.map(lambda g: g * mask_filler, grads)
        updates, after = tx.update(filled, before, PARAMS, value=losses * mask_filler, mask=empty)
        assert_states_equal(after, before)
        assert_states_equal(updates, PARAMS)
    updates, after = tx.update(
        jax.tree.map(lambda p: p + jnp.nan, PARAMS),
        before,
        PARAMS,
        value=jnp.nan,
        gradient_variance=jnp.nan,
        count=0,
    )
    assert_states_equal(after, before)
    assert_states_equal(updates, PARAMS)


@pytest.mark.slow
@given(
    st.integers(1, 50),
    st.integers(50, 300),
    st.one_of(st.integers(1, 40), st.sets(st.integers(1, 300), min_size=1).map(sorted).map(tuple)),
    st.floats(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_state_always_holds_a_legal_size(low, high, round_to, position):
    allowed = range(round_to, high + 1, round_to) if isinstance(round_to, int) else round_to
    legal = [size for size in allowed if low <= size <= high]
    initial = round(low + position * (high - low))
    options = {"min_batch_size": low, "max_batch_size": high, "round_to": round_to}
    if not legal:
        with pytest.raises(ValueError, match="round_to"):
            cabs(0.1, **options)
        return
    assert cabs(0.1, **options).init(0.0).batch_size == legal[0]
    tx = cabs(1.0, decay=0.0, initial_batch_size=initial, **options)
    state = tx.init(0.0)
    assert int(state.batch_size) in legal
    assert state.info.raw_batch_size == initial
    for variance in (0.0, 17.5, 123.4, jnp.inf, 1e9):
        _, state = update_with_moments(tx, state, variance=variance)
        assert int(state.batch_size) in legal


@functools.cache
def compiled(debias):
    """An initial state, and the update of it."""
    tx = adapt_batch_size(rules.cabs(0.1), min_batch_size=1, debias=debias)
    update = jax.jit(lambda state, **moments: update_with_moments(tx, state, **moments)[1])
    return tx.init(0.0), update


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(
    "absurd",
    [{"variance": 1e38}, {"value": 1e38}, {"value": -1e38}, {"value": 1e30, "variance": 1e38}],
)
@pytest.mark.parametrize("before", [0, 30])
def test_the_size_recovers_from_one_absurd_measurement(debias, absurd, before):
    state, update = compiled(debias)
    sane = {"value": 1.0, "variance": 500.0, "count": 16}
    for _ in range(before):
        state = update(state, **sane)
    state = update(update(state, **sane | absurd), **sane)
    averages = {"value": state.value_average, "variance": state.gradient_variance_average}
    for name in absurd:  # is forgotten at once
        whole = float(state.weight) if debias else 1.0
        assert averages[name] == pytest.approx(whole * sane[name], rel=1e-5)
    for _ in range(70):
        state = update(state, **sane)
    assert state.info.raw_batch_size == pytest.approx(50.0, rel=0.05)
    for average in state[2:5]:
        assert abs(average) < 1000


def test_averages_of_any_sane_numbers_are_those_of_the_paper():
    tx = adapt_batch_size(rules.cabs(0.1))
    state, value_average, variance_average = tx.init(0.0), 1.0, 0.0
    for value, variance in [(1.0, 1e8), (1e-30, 0.0), (0.0, 1e-30), (5.0, 3e8), (1e8, 1e-10)]:
        _, state = update_with_moments(tx, state, value=value, variance=variance)
        value_average = 0.95 * value_average + 0.05 * value
        variance_average = 0.95 * variance_average + 0.05 * variance
        assert state.value_average == pytest.approx(value_average, rel=1e-5)
        assert state.gradient_variance_average == pytest.approx(variance_average, rel=1e-5)
