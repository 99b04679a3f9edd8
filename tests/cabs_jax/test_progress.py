"""F − F* from the progress of the loss, and the batch sizes that follow from it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cabs_jax
from cabs_jax import progress, rules
from cabs_jax.statistics import GradientMoments

PARAMS = {"w": jnp.zeros(3)}
ESTIMATED = cabs_jax.cabs(0.5, optimal_value="estimated")  # one, so that it is compiled once


def after(losses, sizes):
    """The averages after batches with these losses and sizes."""

    def step(carry, batch):
        averages, examples, first = carry
        loss, size = batch
        examples = progress.add_examples(examples, size)
        seen = progress.as_float32(examples)
        averages = progress.advance(averages, loss, None, size, seen, first)
        return (averages, examples, jnp.zeros((), bool)), averages.gap

    start = (progress.no_progress(), progress.no_examples(), jnp.ones((), bool))
    batches = jnp.asarray(losses, jnp.float32), jnp.asarray(sizes, jnp.int32)
    (averages, examples, _), gaps = jax.jit(lambda b: jax.lax.scan(step, start, b))(batches)
    return averages, examples, gaps


@pytest.mark.parametrize("floor", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("sizes", ["constant", "growing"])
def test_the_gap_of_a_loss_that_falls_as_one_over_n_is_found_whatever_its_floor(floor, sizes):
    steps = 4_000
    size = np.full(steps, 16) if sizes == "constant" else 16 + np.arange(steps) // 20
    seen = np.cumsum(size)
    _, _, gaps = after(floor + 1_000 / (seen + 100), size)
    left = 1_000 / (seen + 100)
    np.testing.assert_allclose(gaps[1_000:], left[1_000:], rtol=0.15)


def test_averages_are_those_with_polynomial_weights():
    sizes = np.full(2_000, 16)
    losses = np.random.default_rng(0).normal(size=2_000)
    averages, _, _ = after(losses, sizes)
    seen = np.cumsum(sizes) / sizes.sum()
    for average, power in ((averages.slow, 1), (averages.fast, 7)):
        weights = seen**power
        np.testing.assert_allclose(average, (weights @ losses) / weights.sum(), atol=2e-3)


@pytest.mark.slow
@given(st.lists(st.integers(0, 2**31 - 1), max_size=20))
@settings(max_examples=50, deadline=None)
def test_examples_are_counted_exactly_beyond_what_an_int32_holds(counts):
    examples = progress.no_examples()
    for count in counts:
        examples = progress.add_examples(examples, jnp.int32(count))
    high, low = (int(x) for x in examples)
    assert high * 2**30 + low == sum(counts)
    assert float(progress.as_float32(examples)) == pytest.approx(sum(counts), rel=1e-6)


def run(tx, losses, *, count=16, variance=100.0, averaged=None):
    """States after each of the losses."""
    state, states = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for i, loss in enumerate(losses):
        of_averaged = None if averaged is None else jnp.float32(averaged[i])
        moments = GradientMoments(
            jnp.float32(loss), PARAMS, jnp.float32(variance), jnp.int32(count), of_averaged
        )
        _, state = update(PARAMS, state, PARAMS, moments=moments)
        states.append(state)
    return states


def sizes_of(states):
    return [float(state.unrounded_batch_size) for state in states]


@pytest.mark.slow
def test_a_loss_at_its_floor_makes_the_batch_grow_gradually_and_to_the_largest():
    states = run(cabs_jax.cabs(0.5, optimal_value="estimated", max_batch_size=64), [2.0] * 400)
    sizes = sizes_of(states)
    assert sizes[0] < 16.4
    assert sizes[-1] == 64.0
    assert max(np.diff(np.log(sizes))) <= 0.0201


def test_a_loss_that_vanishes_keeps_the_batch_small():
    falling = 2.0 * 0.97 ** np.arange(400)
    states = run(ESTIMATED, falling, variance=1.0)
    assert sizes_of(states)[-1] == 16.0


@pytest.mark.slow
@pytest.mark.parametrize("better_by", [-0.1, 0.0])
def test_where_averaged_weights_are_no_better_the_batch_stays_small(better_by):
    stuck = np.full(300, 2.0)
    assert sizes_of(run(ESTIMATED, stuck, averaged=stuck - better_by))[-1] == 16.0
    assert sizes_of(run(ESTIMATED, stuck, averaged=stuck - 0.5))[-1] > 100.0


def test_an_averaged_loss_that_was_not_measured_leaves_the_excess_alone():
    every = run(ESTIMATED, [2.0] * 2, averaged=[1.5, float("nan")])
    assert every[0].progress.excess == every[1].progress.excess == pytest.approx(0.005)
    assert np.isfinite(every[1].batch_size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_counts_its_examples_and_nothing_else(bad):
    good, after_bad = run(ESTIMATED, [2.0, bad])
    assert after_bad.progress == good.progress
    assert after_bad.unrounded_batch_size == good.unrounded_batch_size
    assert after_bad.examples == (0, 32)


@pytest.mark.slow
def test_an_empty_batch_changes_nothing():
    state = run(ESTIMATED, [2.0, 1.9])[-1]
    empty = GradientMoments(jnp.float32(0), PARAMS, jnp.float32(0), jnp.int32(0))
    _, same = ESTIMATED.update(PARAMS, state, PARAMS, moments=empty)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_the_estimate_needs_the_number_of_examples_and_says_so():
    with pytest.raises(ValueError, match=r"counts examples: pass moments= or count="):
        ESTIMATED.update(
            PARAMS,
            ESTIMATED.init(PARAMS),
            PARAMS,
            value=jnp.float32(1),
            gradient_variance=jnp.float32(1),
        )
    with pytest.raises(ValueError, match="'guessed'"):
        cabs_jax.cabs(0.5, optimal_value="guessed")


@pytest.mark.slow
def test_the_estimate_under_injected_hyperparameters_is_the_same():
    plain = cabs_jax.cabs(0.5, optimal_value="estimated", max_batch_size=64)
    injected = optax.inject_hyperparams(
        cabs_jax.cabs, static_args=("min_batch_size", "max_batch_size", "round_to")
    )(0.5, optimal_value="estimated", max_batch_size=64)
    states = run(injected, [2.0] * 60)
    for one, other in zip(run(plain, [2.0] * 60), states, strict=True):
        assert cabs_jax.batch_size(one) == cabs_jax.batch_size(other)


@pytest.mark.slow
def test_both_paths_estimate_alike():
    rng = np.random.default_rng(0)
    state_a = state_b = ESTIMATED.init(PARAMS)
    update = jax.jit(ESTIMATED.update)
    for _ in range(20):
        losses = jnp.asarray(rng.uniform(1, 2, 16), jnp.float32)
        grads = {"w": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)}
        _, state_a = update(grads, state_a, PARAMS, value=losses)
        mean = {"w": grads["w"].mean(0)}
        variance = jnp.sum(grads["w"].var(0))
        moments = GradientMoments(losses.mean(), mean, variance, jnp.int32(16))
        _, state_b = update(mean, state_b, PARAMS, moments=moments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), state_a, state_b)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_beyond_the_largest_size_a_smaller_step_stands_in(momentum):
    """At a size of 40·α·ξ/F the noise floor α·ξ/(4m) is that of the unbounded run."""
    bounded = cabs_jax.cabs(
        0.5, momentum=momentum, max_batch_size=32, beyond_max="scale_learning_rate", decay=0.0
    )
    clipped = cabs_jax.cabs(0.5, momentum=momentum, max_batch_size=32, decay=0.0)
    grads = {"w": jnp.ones(3)}
    results = []
    for tx in (bounded, clipped):
        state = tx.init(PARAMS)
        for _ in range(2):
            moments = GradientMoments(jnp.float32(1), grads, jnp.float32(256), jnp.int32(32))
            updates, state = tx.update(grads, state, PARAMS, moments=moments)
        results.append((updates, state))
    (scaled, state), (full, _) = results
    asked = 0.5 * 256 / 1.0 * (1 if momentum is None else 10)
    np.testing.assert_allclose(scaled["w"], full["w"] * 32 / asked, rtol=1e-6)
    info = optax.tree.get(state, "info")
    assert float(info.learning_rate_scale) == pytest.approx(32 / asked)
    assert cabs_jax.batch_size(state) == 32


@pytest.mark.slow
def test_where_an_infinite_size_is_asked_for_the_last_finite_one_counts():
    tx = cabs_jax.cabs(0.5, max_batch_size=32, beyond_max="scale_learning_rate", decay=0.0)
    scales = [
        float(state.info.learning_rate_scale) for state in run(tx, [1.0, 0.0, 0.0], variance=256)
    ]
    assert scales == [1.0, 0.25, 0.25]


def test_beyond_max_is_one_of_two():
    with pytest.raises(ValueError, match="beyond_max must be one of 'clip'"):
        cabs_jax.cabs(0.5, beyond_max="shrink")


@pytest.mark.slow
def test_adam_estimates_with_and_without_averaged_weights():
    tx = cabs_jax.cabs_adam(0.1, optimal_value="estimated", max_batch_size=64)
    grads = {"w": jnp.ones(3)}
    moments = GradientMoments(
        jnp.float32(2), grads, {"w": jnp.full(3, 300.0)}, jnp.int32(16), jnp.float32(1.0)
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(300):
        _, state = update(grads, state, PARAMS, moments=moments)
    assert cabs_jax.batch_size(state) > 40


def test_moments_are_one_argument_and_refuse_to_be_two():
    tx = cabs_jax.cabs(0.5)
    moments = GradientMoments(jnp.float32(1), PARAMS, jnp.float32(1), jnp.int32(4))
    for wrong, error in (
        ({"count": moments.count}, "moments= and count="),
        ({"gradient_variance": moments.variance}, "moments= and gradient_variance="),
        ({"mask": jnp.ones(4, bool)}, "moments= and mask="),
    ):
        with pytest.raises(ValueError, match=error):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, moments=moments, **wrong)
    with pytest.raises(TypeError, match="has_aux"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, moments=(moments, None))


def test_moments_beside_the_value_that_another_transformation_wants():
    chained = optax.chain(cabs_jax.cabs(0.5), optax.contrib.reduce_on_plateau())
    moments = GradientMoments(jnp.float32(1), PARAMS, jnp.float32(1), jnp.int32(4))
    _, state = chained.update(
        PARAMS, chained.init(PARAMS), PARAMS, moments=moments, value=moments.value
    )
    assert cabs_jax.batch_size(state) == 16


@pytest.mark.slow
def test_rules_of_ones_own_may_use_what_progress_tells():
    seen = []

    def rule(statistics: rules.Statistics):
        seen.append(statistics)
        return 16.0

    tx = cabs_jax.adapt_batch_size(rule)
    run(tx, [2.0, 1.0], averaged=[1.0, 1.0])
    assert seen[0].estimated_gap is not None
    assert seen[0].averaged_excess is not None
    assert seen[0].examples is not None
