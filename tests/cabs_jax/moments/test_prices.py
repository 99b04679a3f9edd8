"""What the moments cost for losses that people write, as multiples of the plain gradient's."""

import jax
import jax.numpy as jnp
import pytest

from cabs_jax import gradient_moments
from tests.cabs_jax.moments.zoo.case import squares


def plain(loss):
    return jax.value_and_grad(lambda p, batch: jnp.mean(jax.vmap(loss, (None, 0))(p, batch)))


def mlp(p, x):
    for w in p:
        x = jnp.tanh(x @ w)
    return squares(x)


@pytest.mark.slow
def test_memory_of_a_perceptron_is_that_of_the_plain_gradient():
    def memory(function):
        params, batch = [jnp.ones((256, 256))] * 2, jnp.ones((128, 256))
        compiled = jax.jit(function).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Squares of activations are added up as they are made, and not written to memory.
    assert memory(gradient_moments(mlp)) < 1.3 * memory(plain(mlp))
