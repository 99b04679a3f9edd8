import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training import averages

LARGEST = 2**31 - 1


@pytest.mark.slow
def test_the_weight_of_a_batch_stays_a_weight_beyond_what_int32_counts():
    optimizer = averages.with_averages(optax.with_extra_args_support(optax.identity()))
    state = optimizer.init(jnp.zeros(1))._replace(examples=jnp.int32(LARGEST - 10))
    moments = types.SimpleNamespace(count=jnp.int32(1 << 24))
    for _ in range(2):
        _, state = optimizer.update(jnp.ones(1), state, jnp.zeros(1), moments=moments)
        assert state.examples == LARGEST
    weight = 4 * 2**24 / (2**31 + 3 * 2**24)
    expected = weight + (1 - weight) * weight
    np.testing.assert_allclose(state.polynomial, [expected], rtol=1e-5)
