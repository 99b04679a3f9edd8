"""Momentum and Adam coupled to their batch sizes, against float64 and against optax."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cabs_jax import batch_size, cabs, cabs_adam, gradient_moments
from cabs_jax.statistics import moments_from_per_example

RANDOM = np.random.default_rng(0)
STEPS, EXAMPLES = 6, 5
LOSSES = RANDOM.uniform(0.1, 1.1, (STEPS, EXAMPLES)).astype(np.float32)
GRADS = {
    "b": (1 + RANDOM.normal(size=(STEPS, EXAMPLES, 2))).astype(np.float32),
    "w": RANDOM.normal(size=(STEPS, EXAMPLES, 2, 3)).astype(np.float32),
}
PARAMS = {"b": jnp.array([1.0, -2.0]), "w": jnp.full((2, 3), 0.5, jnp.float32)}
ALPHA, B1, B2, EPS = 0.5, 0.8, 0.9, 0.01
SIZES = {"min_batch_size": 1, "max_batch_size": 1000, "decay": 0.5}


def coupled_adam(**options):
    return cabs_adam(ALPHA, B1, B2, EPS, **SIZES | options)


def per_example(step):
    return jax.tree.map(lambda x: jnp.asarray(x)[step], (LOSSES, GRADS))


def path_a(step):
    losses, grads = per_example(step)
    return grads, {"value": losses}


def path_b(step):
    m = moments_from_per_example(*per_example(step), variance="diagonal")
    return m.mean, {"value": m.value, "gradient_variance": m.variance, "count": m.count}


def run(tx, inputs=path_b, steps=STEPS):
    """Returns the parameters and the states after each of a few compiled steps."""

    @jax.jit
    def step(params, state, number):
        updates, extra_args = inputs(number)
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params, states = PARAMS, [tx.init(PARAMS)]
    for number in range(steps):
        params, state = step(params, states[-1], number)
        states.append(state)
    return params, states


@functools.cache
def ran(make, inputs=path_b):
    """The run of an optimizer that several tests look at."""
    return run(make(), inputs)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def adam_by_hand(alpha=ALPHA, decay=0.5, b2=B2, eps=EPS):
    """The raw batch sizes of Adam in float64, None where there is none."""
    grads = np.concatenate([g.reshape(STEPS, EXAMPLES, -1) for g in GRADS.values()], axis=2)
    second_moment, loss_average, noise_average, raw = 0.0, 1.0, 0.0, []
    for step, (losses, g) in enumerate(zip(LOSSES, grads.astype(np.float64), strict=True)):
        if step == 0:
            raw.append(None)
        else:
            unbiased = second_moment / (1 - b2**step)
            noise = np.sum(g.var(0) / (np.sqrt(unbiased) + eps))
            noise_average = decay * noise_average + (1 - decay) * noise
            loss_average = decay * loss_average + (1 - decay) * losses.astype(np.float64).mean()
            raw.append(alpha * noise_average / loss_average)
        second_moment = b2 * second_moment + (1 - b2) * g.mean(0) ** 2
    return raw


@pytest.mark.parametrize("inputs", [path_a, path_b])
def test_adam_couples_to_its_step_sizes_before_this_step(inputs):
    _, states = ran(coupled_adam, inputs)
    expected = adam_by_hand()
    for state, raw in zip(states[2:], expected[1:], strict=True):
        assert state.adapt.info.raw_batch_size == pytest.approx(raw, rel=1e-5)
        assert batch_size(state) == round(raw)
    assert len({round(raw) for raw in expected[1:]}) > 3


@pytest.mark.parametrize("inputs", [path_a, path_b])
def test_the_first_step_of_adam_leaves_batch_size_and_averages_alone(inputs):
    tx = coupled_adam(initial_batch_size=100, max_batch_size=200)
    _, (start, state) = run(tx, inputs, steps=1)
    assert batch_size(state) == 100
    assert state.adapt[2:6] == start.adapt[2:6]
    assert state.adapt.step == 1
    assert state.adapt.info.raw_batch_size == 100.0
    assert state.adapt.info.bound == 0
    assert state.adapt.info.non_finite == 0
    assert state.adapt.info.value == pytest.approx(LOSSES[0].mean(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the learning rate falls")
@pytest.mark.parametrize("inputs", [path_a, path_b])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_exactly_those_of_optax_adam(inputs, weight_decay):
    schedule = optax.linear_schedule(ALPHA, 0.1, STEPS)
    for rate in (ALPHA, schedule):
        tx = cabs_adam(rate, B1, B2, EPS, weight_decay=weight_decay)
        reference = optax.adamw(rate, B1, B2, EPS, weight_decay=weight_decay)
        ours, theirs, params = tx.init(PARAMS), reference.init(PARAMS), PARAMS
        for step in range(STEPS):
            updates, extra_args = inputs(step)
            updates, ours = tx.update(updates, ours, params, **extra_args)
            expected, theirs = reference.update(path_b(step)[0], theirs, params)
            jax.tree.map(np.testing.assert_array_equal, updates, expected)
            params = optax.apply_updates(params, updates)


def test_the_defaults_of_adam_are_those_of_optax():
    params, _ = run(cabs_adam(0.1))
    expected, _ = run(optax.adam(0.1))
    assert_close(params, expected, rtol=1e-6)


def test_adam_calls_a_schedule_with_the_step():
    rates = [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    _, states = run(
        cabs_adam(optax.piecewise_constant_schedule(0.5, {2: 0.5}), B1, B2, EPS, **SIZES)
    )
    for rate, state, raw in zip(rates[1:], states[2:], adam_by_hand(alpha=1.0)[1:], strict=True):
        assert state.adapt.info.raw_batch_size == pytest.approx(rate * raw, rel=1e-5)


def test_scale_and_optimal_value_enter_the_size_of_adam():
    _, plain = ran(coupled_adam)
    _, changed = run(coupled_adam(scale=3.0, optimal_value=-1.0))
    average = float(plain[-1].adapt.value_average)
    expected = 3 * float(plain[-1].adapt.info.raw_batch_size) * average / (average + 1)
    assert changed[-1].adapt.info.raw_batch_size == pytest.approx(expected, rel=1e-5)


def test_coordinates_without_a_second_moment_do_not_count():
    tx = cabs_adam(1.0, B1, B2, 0.0, min_batch_size=1, decay=0.0)
    params = jnp.zeros(2)
    state = tx.init(params)

    def update(mean, variance, state):
        return tx.update(jnp.array(mean), state, params, value=2.0, gradient_variance=variance)[1]

    state = update([3.0, 0.0], jnp.zeros(2), state)
    with jax.debug_nans(True):
        state = update([3.0, 1.0], jnp.array([12.0, 1e9]), state)
    assert state.adapt.info.raw_batch_size == pytest.approx(12 / 3 / 2, rel=1e-6)
    assert state.adapt.info.gradient_variance == pytest.approx(4.0, rel=1e-6)


def test_adam_with_a_constant_second_moment_is_plain_cabs():
    adam = cabs_adam(0.1, b2=0.0, eps=0.0, min_batch_size=1, decay=0.5)
    plain = cabs(0.1, min_batch_size=1, decay=0.5)
    params, spread = jnp.zeros(3), jnp.array([400.0, 900.0, 1600.0])
    extra_args = {"value": 0.5, "gradient_variance": spread}
    adam_state, plain_state = adam.init(params), plain.init(params)
    _, adam_state = adam.update(jnp.ones(3), adam_state, params, **extra_args)
    for _ in range(3):
        _, adam_state = adam.update(jnp.ones(3), adam_state, params, **extra_args)
        _, plain_state = plain.update(jnp.ones(3), plain_state, params, **extra_args)
    assert batch_size(adam_state) == batch_size(plain_state) > 100


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.75])
@pytest.mark.parametrize("inputs", [path_a, path_b])
def test_momentum_steps_as_optax_and_couples_to_the_effective_rate(momentum, inputs):
    params, states = run(cabs(ALPHA, momentum=momentum, **SIZES), inputs)
    expected, _ = run(optax.sgd(ALPHA, momentum=momentum))
    assert_close(params, expected)
    _, plain = run(cabs(ALPHA / (1 - momentum), **SIZES), inputs)
    assert_close([state.adapt for state in states], plain)
    assert len({int(batch_size(state)) for state in states}) > 3


@pytest.mark.filterwarnings("ignore:the learning rate falls")
def test_momentum_couples_a_schedule_at_its_effective_rate():
    schedule = optax.linear_schedule(0.4, 0.1, STEPS)
    _, states = run(cabs(schedule, momentum=0.75, **SIZES))
    _, plain = run(cabs(lambda step: 4 * schedule(step), **SIZES))
    assert_close([state.adapt for state in states], plain)


def test_without_momentum_there_is_no_trace():
    assert type(cabs(0.1).init(PARAMS)).__name__ == "AdaptBatchSizeState"


OPTIMIZERS = {
    "momentum": lambda **options: cabs(ALPHA, momentum=0.75, **SIZES | options),
    "adam": lambda **options: coupled_adam(weight_decay=0.1, **options),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@each_optimizer
def test_an_empty_batch_changes_nothing(make):
    tx = make()
    params, states = ran(make)
    losses, grads = per_example(0)
    nans = jax.tree.map(lambda g: g * jnp.nan, grads)
    by_mask = tx.update(nans, states[-1], params, value=losses, mask=jnp.zeros(EXAMPLES, bool))
    mean, extra_args = path_b(0)
    by_count = tx.update(mean, states[-1], params, **extra_args | {"count": 0})
    for updates, state in (by_mask, by_count):
        jax.tree.map(np.testing.assert_array_equal, state, states[-1])
        assert all(not jnp.any(u) for u in jax.tree.leaves(updates))


@each_optimizer
def test_padding_has_no_influence(make):
    losses, grads = per_example(1)
    padded = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.full_like(x[:3], jnp.nan)]), (losses, grads)
    )
    tx, state = make(), ran(make)[1][1]
    exact = tx.update(grads, state, PARAMS, value=losses)
    masked = tx.update(
        padded[1], state, PARAMS, value=padded[0], mask=jnp.arange(EXAMPLES + 3) < EXAMPLES
    )
    assert_close(masked, exact)


# What takes the number of examples, of which nothing is known without it.
UNCOUNTED = dict.fromkeys(
    ("squared_gradient_norm", "noise_scale", "noise_scale_low", "noise_scale_high"), 0.0
)


@each_optimizer
def test_count_may_be_left_out(make):
    def without_count(step):
        mean, extra_args = path_b(step)
        return mean, {name: x for name, x in extra_args.items() if name != "count"}

    params, states = run(make(), without_count)
    expected, counted = ran(make)
    assert_close(params, expected)
    assert_close(*([s.adapt.info._asdict() | UNCOUNTED for s in run] for run in (states, counted)))


@each_optimizer
def test_a_step_that_is_not_finite_changes_no_average(make):
    tx = make()
    params, states = ran(make)
    mean, extra_args = path_b(0)
    bad = mean | {"b": mean["b"] * jnp.nan}
    updates, state = tx.update(bad, states[-1], params, **extra_args)
    assert state.adapt[1:7] == states[-1].adapt[1:7]
    assert state.adapt.info.non_finite == 1
    assert jnp.all(jnp.isnan(updates["b"]))
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    start = guarded.init(params)._replace(inner_state=states[-1])
    updates, state = jax.jit(guarded.update)(bad, start, params, **extra_args)
    assert_close(state.inner_state, states[-1])
    assert not jnp.any(updates["b"])


@pytest.mark.slow
@each_optimizer
def test_statistics_are_float32_whatever_the_dtype(make):
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (PARAMS, GRADS))
    tx = make()
    state, exact, update = tx.init(params), tx.init(PARAMS), jax.jit(tx.update)
    for step in range(3):
        of_step = jax.tree.map(lambda g: g[step], grads)
        updates, state = update(of_step, state, params, value=LOSSES[step])
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), of_step)
        _, exact = update(wide, exact, PARAMS, value=LOSSES[step])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.adapt)} == {"float32", "int32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"bfloat16"}
    expected = float(exact.adapt.info.raw_batch_size)
    assert state.adapt.info.raw_batch_size == pytest.approx(expected, rel=0.02)


@each_optimizer
def test_state_survives_pickle_and_keeps_its_structure(make):
    _, states = ran(make)
    restored = pickle.loads(pickle.dumps(states[-1]))
    jax.tree.map(np.testing.assert_array_equal, restored, states[-1])
    assert jax.tree.structure(states[-1]) == jax.tree.structure(states[0])
    shapes = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in states]
    assert shapes[0] == shapes[1] == shapes[-1]


def test_inject_hyperparams():
    static = ("min_batch_size", "max_batch_size", "initial_batch_size", "round_to")
    adam = optax.inject_hyperparams(cabs_adam, static_args=static)(ALPHA, B1, B2, EPS, **SIZES)
    params, states = run(adam)
    expected, direct = ran(coupled_adam)
    assert_close((params, states[-1].inner_state), (expected, direct[-1]))
    assert {"learning_rate", "b1", "b2", "eps", "weight_decay"} <= set(states[-1].hyperparams)
    assert batch_size(states[-1]) == batch_size(direct[-1])

    momentum = optax.inject_hyperparams(cabs, static_args=static)(ALPHA, momentum=0.75, **SIZES)
    params, states = run(momentum)
    expected, direct = ran(OPTIMIZERS["momentum"])
    assert_close((params, states[-1].inner_state), (expected, direct[-1]))


@each_optimizer
def test_chain_finds_the_batch_size_and_compiles_once(make):
    traces = []

    def counted(step):
        traces.append(1)
        return path_b(step)

    tx = optax.chain(make(), optax.clip_by_global_norm(1e-3))
    _, states = run(tx, counted)
    _, alone = ran(make)
    assert len(traces) == 1
    assert batch_size(states[2]) == batch_size(alone[2])


def test_masked_adam_takes_a_diagonal_that_is_masked_too():
    mask = {"b": True, "w": False}
    tx = optax.masked(coupled_adam(), mask, mask_compatible_extra_args=True)
    _, states = run(tx)
    only_b = coupled_adam()
    state, params = only_b.init(PARAMS["b"]), PARAMS["b"]
    for step in range(STEPS):
        mean, extra_args = path_b(step)
        extra_args["gradient_variance"] = extra_args["gradient_variance"]["b"]
        _, state = only_b.update(mean["b"], state, params, **extra_args)
    assert_close(states[-1].inner_state.adapt, state.adapt)


@pytest.mark.parametrize("make", [coupled_adam, OPTIMIZERS["momentum"]])
def test_axis_name_averages_over_the_shards(make):
    mesh = jax.make_mesh((5,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    losses, grads = per_example(0)
    tx, single, state = make(axis_name="data"), make(), ran(make)[1][1]
    split, whole = jax.P("data"), jax.P()
    where = {"mesh": mesh, "in_specs": (split, whole, split), "out_specs": whole}
    sharded = jax.shard_map(lambda g, s, v: tx.update(g, s, PARAMS, value=v), **where)
    actual = jax.jit(sharded)(grads, state, losses)
    expected = single.update(grads, state, PARAMS, value=losses)
    assert_close(jax.device_get(actual), jax.device_get(expected))


def test_gradient_moments_feed_adam_as_per_example_gradients_do():
    def loss(params, example):
        return jnp.square(jnp.sum(params["w"] @ example["x"]) + params["b"] @ example["y"])

    batch = {
        "x": jnp.asarray(RANDOM.normal(size=(8, 3)), jnp.float32),
        "y": jnp.asarray(RANDOM.normal(size=(8, 2)), jnp.float32),
    }
    tx, state = coupled_adam(), ran(coupled_adam)[1][1]
    losses, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(PARAMS, batch)
    expected = tx.update(grads, state, PARAMS, value=losses)
    m = jax.jit(gradient_moments(loss, variance="diagonal"))(PARAMS, batch)
    actual = tx.update(
        m.mean, state, PARAMS, value=m.value, gradient_variance=m.variance, count=m.count
    )
    assert_close(actual, expected, rtol=1e-4)


def test_adam_refuses_the_trace_and_says_where_the_diagonal_comes_from():
    mean, extra_args = path_b(0)
    extra_args["gradient_variance"] = jnp.float32(1.0)
    with pytest.raises(ValueError, match=r'must be the diagonal.*variance="diagonal"'):
        coupled_adam().update(mean, coupled_adam().init(PARAMS), PARAMS, **extra_args)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cabs(0.1, momentum=1.0), r"momentum must be None or in \[0, 1\), got 1\.0"),
        (lambda: cabs(0.1, momentum=-0.5), "momentum.*got -0.5"),
        (lambda: cabs_adam(-0.1), "learning_rate.*got -0.1"),
        (lambda: cabs_adam(0.1, b1=1.0), r"b1 must be in \[0, 1\), got 1\.0"),
        (lambda: cabs_adam(0.1, b2=-0.5), "b2.*got -0.5"),
        (lambda: cabs_adam(0.1, eps=-1e-8), "eps.*got -1e-08"),
        (lambda: cabs_adam(0.1, weight_decay=-0.5), "weight_decay.*got -0.5"),
        (lambda: cabs_adam(0.1, decay=1.0), "decay.*got 1.0"),
        (lambda: cabs_adam(0.1, min_batch_size=9, max_batch_size=8), "9 and 8"),
    ],
)
def test_bad_arguments_are_shown(make, message):
    with pytest.raises(ValueError, match=message):
        make()
