"""The transformation under JAX's transformations and inside optax's."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import cabs_jax
from cabs_jax import adapt_batch_size, batch_size, cabs, rules
from cabs_jax.statistics import moments_from_per_example

PARAMS = {"b": jnp.zeros(2), "w": jnp.ones(3)}
RULE = rules.cabs(3.0)
OPTIONS = {"min_batch_size": 2, "max_batch_size": 300, "decay": 0.5}


RANDOM = np.random.default_rng(0)
LOSSES = RANDOM.uniform(0.1, 1.1, (12, 6)).astype(np.float32)
GRADS = {
    "b": RANDOM.normal(size=(12, 6, 2)).astype(np.float32),
    "w": RANDOM.normal(size=(12, 6, 3)).astype(np.float32),
}


def per_example(seed):
    return jax.tree.map(lambda x: jnp.asarray(x)[seed], (LOSSES, GRADS))


def path_a(seed):
    losses, grads = per_example(seed)
    return grads, {"value": losses}


def path_a_mean_loss(seed):
    losses, grads = per_example(seed)
    return grads, {"value": losses.mean()}


def path_b(seed):
    m = moments_from_per_example(*per_example(seed))
    return m.mean, {"value": m.value, "gradient_variance": m.variance, "count": m.count}


def run(tx, inputs=path_b, steps=3):
    """Returns the parameters and the state after a few compiled steps."""

    @jax.jit
    def step(params, state, seed):
        updates, extra_args = inputs(seed)
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for seed in range(steps):
        params, state = step(params, state, seed)
    return params, state


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


@pytest.fixture(scope="module")
def alone():
    params, state = run(cabs(3.0, **OPTIONS))
    assert 2 < batch_size(state) < 300
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [path_a, path_a_mean_loss])
def test_both_paths_agree(inputs, alone):
    assert_close(run(cabs(3.0, **OPTIONS), inputs), alone)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [path_a, path_b])
def test_scan(inputs, alone):
    tx = cabs(3.0, **OPTIONS)

    def step(carry, seed):
        params, state = carry
        updates, extra_args = inputs(seed)
        updates, state = tx.update(updates, state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), batch_size(state)

    carry, sizes = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(3))
    assert_close(carry, alone)
    assert sizes[-1] == batch_size(alone[1])


@pytest.mark.slow  # compiles three steps in one
def test_vmap_over_seeds(alone):
    tx = cabs(3.0, **OPTIONS)

    def train(first_seed):
        state, params = tx.init(PARAMS), PARAMS
        for seed in range(3):
            grads, extra_args = path_a(first_seed + seed)
            updates, state = tx.update(grads, state, params, **extra_args)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = jax.jit(jax.vmap(train))(jnp.arange(0, 12, 3))
    assert_close(jax.tree.map(lambda x: x[0], (params, state)), alone)
    sizes = batch_size(state)
    assert sizes.shape == (4,)
    assert sizes.dtype == jnp.int32
    assert len(set(sizes.tolist())) > 1


@pytest.mark.slow
def test_vmap_over_learning_rates(alone):
    def train(learning_rate):
        tx = cabs(learning_rate, **OPTIONS)
        grads, extra_args = path_a(0)
        return tx.update(grads, tx.init(PARAMS), PARAMS, **extra_args)[1]

    state = jax.jit(jax.vmap(train))(jnp.array([0.0, 3.0, 6.0]))
    raw = state.info.raw_batch_size
    np.testing.assert_allclose(raw, [0.0, raw[1], 2 * raw[1]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [path_a, path_b])
@pytest.mark.parametrize(
    "followers",
    [
        [optax.trace(0.9)],
        [optax.add_decayed_weights(0.1)],
        [optax.clip_by_global_norm(0.01)],
        [optax.scale_by_adam()],
        [optax.add_decayed_weights(0.1), optax.trace(0.9), optax.clip_by_global_norm(1.0)],
    ],
    ids=["trace", "decay", "clip", "adam", "all"],
)
def test_chain_applies_to_the_mean_gradient(inputs, followers, alone):
    followers = [*followers, optax.scale_by_learning_rate(0.3)]
    tx = optax.chain(adapt_batch_size(RULE, **OPTIONS), *followers)
    params, state = run(tx, inputs)
    expected, _ = run(optax.chain(*followers), path_b)
    assert_close(params, expected, atol=1e-5)
    assert_close(state[0], alone[1])
    assert batch_size(state) == batch_size(alone[1])


def test_chain_after_a_transformation_of_the_mean_gradient():
    tx = optax.chain(optax.clip_by_global_norm(0.01), adapt_batch_size(RULE))
    _, state = run(tx, path_b)
    assert state[1].info.mean_gradient_squared_norm == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize("inputs", [path_a, path_b])
def test_inject_hyperparams_with_static_arguments(inputs, alone):
    tx = optax.inject_hyperparams(
        cabs,
        static_args=("min_batch_size", "max_batch_size", "initial_batch_size", "round_to"),
    )(3.0, **OPTIONS)
    params, state = run(tx, inputs)
    assert_close((params, state.inner_state), alone)
    assert batch_size(state) == batch_size(alone[1])
    assert set(state.hyperparams) == {"learning_rate", "decay", "scale", "eps", "optimal_value"}


@pytest.mark.slow
def test_inject_hyperparams_without_static_arguments_traces_the_bounds(alone):
    tx = optax.inject_hyperparams(cabs)(3.0, **OPTIONS, initial_batch_size=5)
    assert batch_size(tx.init(PARAMS)) == 5
    params, state = run(tx)
    assert_close(params, alone[0])
    assert batch_size(state) == batch_size(alone[1])
    state.hyperparams["max_batch_size"] = jnp.int32(3)
    mean, extra_args = path_b(3)
    _, state = jax.jit(tx.update)(mean, state, PARAMS, **extra_args)
    assert batch_size(state) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the learning rate falls")
def test_inject_hyperparams_of_a_schedule():
    schedule = optax.linear_schedule(3.0, 1.0, 2)
    injected, _ = run(optax.inject_hyperparams(cabs)(schedule, **OPTIONS))
    direct, _ = run(cabs(schedule, **OPTIONS))
    assert_close(injected, direct)


def test_inject_hyperparams_needs_the_rule_to_be_static(alone):
    tx = optax.inject_hyperparams(adapt_batch_size, static_args="rule")(RULE, **OPTIONS)
    assert batch_size(run(tx)[1]) == batch_size(alone[1])
    with pytest.raises((TypeError, AttributeError, ValueError)):
        optax.inject_hyperparams(adapt_batch_size)(RULE, **OPTIONS).init(PARAMS)


def test_inject_hyperparams_checks_what_is_concrete():
    with pytest.raises(ValueError, match="got 0"):
        optax.inject_hyperparams(cabs)(3.0, min_batch_size=0).init(PARAMS)


@pytest.mark.slow
def test_masked_sees_the_chosen_gradients_alone(alone):
    tx = optax.masked(cabs(3.0, **OPTIONS), {"b": False, "w": True})
    params, state = run(tx)
    assert_close(params["w"], alone[0]["w"])
    assert batch_size(state) == batch_size(alone[1])
    mean, extra_args = path_b(0)
    updates, state = tx.update(mean, tx.init(PARAMS), PARAMS, **extra_args)
    assert_close(updates["b"], mean["b"])
    norm = state.inner_state.info.mean_gradient_squared_norm
    assert norm == pytest.approx(jnp.sum(mean["w"] ** 2))


def test_masked_with_a_diagonal_variance_masks_it_too():
    diagonal = {"b": jnp.full(2, 10.0), "w": jnp.full(3, 2.0)}
    mask = {"b": False, "w": True}
    arguments = {"value": 1.0, "gradient_variance": diagonal}
    tx = optax.masked(cabs(0.1), mask, mask_compatible_extra_args=True)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **arguments)
    assert state.inner_state.info.gradient_variance == 6.0
    with pytest.raises(ValueError, match="mask_compatible_extra_args"):
        optax.masked(cabs(0.1), mask).update(PARAMS, state, PARAMS, **arguments)


def test_partition(alone):
    labels = {"b": "plain", "w": "adaptive"}
    tx = optax.partition({"adaptive": cabs(3.0, **OPTIONS), "plain": optax.sgd(3.0)}, labels)
    params, state = run(tx)
    assert_close(params, alone[0])
    assert batch_size(state) == batch_size(alone[1])


@pytest.mark.slow
def test_partition_after_adapt_batch_size_takes_per_example_gradients(alone):
    labels = {"b": "slow", "w": "fast"}
    tx = optax.chain(
        adapt_batch_size(RULE, **OPTIONS),
        optax.partition({"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}, labels),
    )
    params, state = run(tx, path_a)
    expected, _ = run(optax.partition({"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}, labels))
    assert_close(params, expected)
    assert batch_size(state) == batch_size(alone[1])


@pytest.mark.slow
def test_apply_if_finite_guards_the_parameters(alone):
    tx = optax.apply_if_finite(cabs(3.0, **OPTIONS), max_consecutive_errors=3)
    params, state = run(tx)
    assert_close(params, alone[0])
    mean, extra_args = path_b(3)
    bad = mean | {"w": mean["w"].at[0].set(jnp.nan)}
    updates, rejected = jax.jit(tx.update)(bad, state, params, **extra_args)
    assert_close(updates, jax.tree.map(jnp.zeros_like, params))
    assert_close(rejected.inner_state, state.inner_state)
    assert batch_size(rejected) == batch_size(alone[1])
    assert rejected.total_notfinite == 1


def test_apply_if_finite_cannot_average_per_example_gradients():
    tx = optax.apply_if_finite(cabs(3.0), max_consecutive_errors=3)
    with pytest.raises(TypeError):
        run(tx, path_a)


@pytest.mark.slow
def test_apply_if_finite_after_adapt_batch_size_guards_the_parameters_on_path_a(alone):
    guarded = optax.apply_if_finite(optax.sgd(3.0), max_consecutive_errors=3)
    tx = optax.chain(adapt_batch_size(RULE, **OPTIONS), guarded)
    params, state = run(tx, path_a)
    assert_close(params, alone[0])
    grads, extra_args = path_a(3)
    bad = grads | {"w": grads["w"].at[0, 0].set(jnp.nan)}
    updates, state = jax.jit(tx.update)(bad, state, params, **extra_args)
    assert_close(updates, jax.tree.map(jnp.zeros_like, params))
    assert batch_size(state) == batch_size(alone[1])
    assert state[0].info.non_finite == 1


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [path_a_mean_loss, path_b])
def test_reduce_on_plateau_scales_the_updates(inputs, alone):
    tx = optax.chain(cabs(3.0, **OPTIONS), optax.contrib.reduce_on_plateau(0.5, patience=100))
    params, state = run(tx, inputs)
    assert_close(params, alone[0])
    assert batch_size(state) == batch_size(alone[1])


@pytest.mark.slow
def test_multi_steps_passes_on_the_loss_of_the_last_micro_step_alone():
    tx = optax.MultiSteps(cabs(3.0, **OPTIONS), every_k_schedule=2)
    _, state = run(tx, path_b, steps=2)
    info = state.inner_opt_state.info
    last = path_b(1)[1]
    assert_close((info.value, info.gradient_variance), (last["value"], last["gradient_variance"]))
    assert batch_size(state) == state.inner_opt_state.batch_size


@pytest.mark.slow
def test_tree_get_finds_the_info(alone):
    state = run(optax.chain(optax.identity(), cabs(3.0, **OPTIONS)))[1]
    assert optax.tree.get(state, "info") == state[1].info


def test_state_survives_pickle(alone):
    restored = pickle.loads(pickle.dumps(alone[1]))
    assert isinstance(restored, type(alone[1]))
    assert_close(restored, alone[1], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_state_survives_orbax(alone, tmp_path):
    tx = optax.chain(cabs(3.0, **OPTIONS), optax.identity())
    state = (alone[1], tx.init(PARAMS)[1])
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
        as_dicts = checkpointer.restore(tmp_path / "state")
    assert_close(restored, state, rtol=0, atol=0)
    assert batch_size(restored) == batch_size(alone[1])
    with pytest.raises(ValueError, match="restore it into the tree"):
        batch_size(as_dicts)


def test_batch_size_is_an_int32_scalar_with_and_without_jit():
    state = cabs(0.1).init(PARAMS)
    for size in (batch_size(state), jax.jit(batch_size)(state)):
        assert size == 16
        assert size.shape == ()
        assert size.dtype == jnp.int32


@pytest.mark.parametrize("state", [(), None, optax.sgd(0.1).init(PARAMS), jnp.int32(16)])
def test_batch_size_says_when_there_is_none(state):
    with pytest.raises(ValueError, match=f"no batch size.*{type(state).__name__}"):
        batch_size(state)


def test_batch_size_says_when_there_is_more_than_one():
    state = optax.chain(adapt_batch_size(RULE), cabs(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match=r"2 batch sizes.*tuple"):
        batch_size(state)
    assert batch_size(state[1]) == 16


def test_public_names_are_those_listed():
    for name in cabs_jax.__all__:
        assert hasattr(cabs_jax, name)
    assert {"Statistics", "adapt_batch_size", "batch_size", "cabs", "rules"} <= set(
        cabs_jax.__all__
    )
    assert cabs_jax.__doc__ is not None
    for name in ("gradient_moments", "rules", "cabs", "BatchLoader"):
        assert f"`{name}`" in cabs_jax.__doc__


def test_the_version_is_that_of_the_installed_package():
    assert re.match(r"\d+[.+]", cabs_jax.__version__)
