"""Parity with the authors' TensorFlow optimizer, over a recorded run of 600 steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import cabs_jax

TRACE = Path(__file__).parents[1] / "data" / "tf_cabs_digits_mlp.npz"
PADDED = 48


def loss_fn(params, example):
    x, target = example
    for weight, bias in params[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ weight + bias, target)


def masked_losses(params, batch, mask):
    losses = jax.vmap(loss_fn, (None, 0))(params, batch)
    return jnp.where(mask, losses, 0.0)


def step_with_per_example_gradients(tx, params, state, batch, mask):
    losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))(params, batch)
    return tx.update(grads, state, params, value=losses, mask=mask)


def step_with_moments(tx, params, state, batch, mask):
    """The definition itself: ξ = (1/m) Σ ‖g_i‖² − ‖ḡ‖², from the gradient of the mean loss."""
    count = jnp.sum(mask)
    value, mean = jax.value_and_grad(lambda p: masked_losses(p, batch, mask).sum() / count)(params)
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
    square = sum(
        jnp.where(mask, jnp.sum(g.reshape(PADDED, -1) ** 2, 1), 0.0).sum()
        for g in jax.tree.leaves(grads)
    )
    variance = square / count - sum(jnp.sum(g**2) for g in jax.tree.leaves(mean))
    return tx.update(mean, state, params, value=value, gradient_variance=variance, count=count)


@pytest.mark.slow
@pytest.mark.parametrize("step", [step_with_per_example_gradients, step_with_moments])
def test_replays_the_recorded_run(step):
    trace = np.load(TRACE, allow_pickle=False)
    digits = load_digits()
    inputs = (digits.data / 16).astype(np.float32)
    targets = digits.target.astype(np.int32)
    params = [tuple(jnp.asarray(trace[f"init_{i + j}"]) for j in (0, 1)) for i in (0, 2, 4)]
    tx = cabs_jax.cabs(
        float(trace["lr"]),
        min_batch_size=int(trace["bs_min"]),
        max_batch_size=int(trace["bs_max"]),
    )
    state = tx.init(params)
    assert cabs_jax.batch_size(state) == trace["batch_size"][0]

    @jax.jit
    def train_step(params, state, batch, mask):
        updates, state = step(tx, params, state, batch, mask)
        return optax.apply_updates(params, updates), state

    states, position = [], 0
    for size in trace["batch_size"]:
        chosen = trace["perm"][(position + np.arange(PADDED)) % len(trace["perm"])]
        position += size
        mask = np.arange(PADDED) < size
        params, state = train_step(params, state, (inputs[chosen], targets[chosen]), mask)
        states.append(state)
    history = jax.tree.map(lambda *leaves: np.stack(leaves), *states)

    def assert_close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-4)

    assert_close(history.info.value, trace["loss"])
    assert_close(history.info.gradient_variance, trace["xi"])
    assert_close(history.value_average, trace["loss_avg"])
    assert_close(history.gradient_variance_average, trace["xi_avg"])
    assert_close(history.info.raw_batch_size, trace["raw"])
    for i, parameter in enumerate(jax.tree.leaves(params)):
        np.testing.assert_allclose(parameter, trace[f"final_{i}"], rtol=1e-4, atol=1e-5)

    near_a_tie = np.abs(trace["raw"] % 1 - 0.5) < 1e-3
    assert near_a_tie.sum() < 10
    np.testing.assert_array_equal(
        history.batch_size[~near_a_tie], trace["next_batch_size"][~near_a_tie]
    )


@pytest.mark.slow
def test_rounds_the_recorded_raw_sizes_as_recorded():
    """From the recorded averages alone, nothing but the rule and the rounding is in play."""
    trace = np.load(TRACE, allow_pickle=False)
    learning_rate, low, high = (trace[key].item() for key in ("lr", "bs_min", "bs_max"))
    tx = cabs_jax.cabs(learning_rate, min_batch_size=low, max_batch_size=high)
    params = jnp.zeros(())

    def step(state, moments):
        value, variance = moments
        _, state = tx.update(params, state, params, value=value, gradient_variance=variance)
        return state, (state.info.raw_batch_size, state.batch_size)

    recorded = jnp.asarray(trace["loss"], jnp.float32), jnp.asarray(trace["xi"], jnp.float32)
    _, (raw, size) = jax.lax.scan(step, tx.init(params), recorded)
    np.testing.assert_allclose(raw, trace["raw"], rtol=1e-5)
    np.testing.assert_array_equal(size, trace["next_batch_size"])
