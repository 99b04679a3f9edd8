"""Steps of a transformation on batches drawn at random, and on moments made up."""

import jax
import jax.numpy as jnp
import numpy as np

PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros(3)}
ALPHA = 0.5


def random_batch(seed, examples=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    grads = {
        "b": 3 * jax.random.normal(keys[0], (examples, 2), dtype) + 1,
        "w": jax.random.normal(keys[1], (examples, 3), dtype),
    }
    return jax.random.uniform(keys[2], (examples,)) + 0.1, grads


def moments(losses, grads):
    """Mean loss, mean gradient and variance, in float64."""
    grads = {name: np.asarray(g, np.float64) for name, g in grads.items()}
    mean = {name: g.mean(0) for name, g in grads.items()}
    variance = sum(g.var(0).sum() for g in grads.values())
    return np.asarray(losses, np.float64).mean(), mean, variance


def update_with_moments(tx, state, value=1.0, variance=0.0, gradient=0.0, **extra_args):
    """Path (b) for a single parameter."""
    return tx.update(
        jnp.float32(gradient),
        state,
        jnp.float32(0.0),
        value=jnp.float32(value),
        gradient_variance=jnp.float32(variance),
        **extra_args,
    )


def after_one_step(tx, **moments):
    _, state = update_with_moments(tx, tx.init(jnp.float32(0.0)), **moments)
    return state


def assert_states_equal(actual, expected, rtol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), actual, expected)
