import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabs_jax.loader.device_order import Position, indices
from cabs_jax.loader.order import Order


@pytest.mark.slow  # compiles it for many lengths
@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 5, 64, 1023, 1024, 1025, 60_000, 2**30]),
    st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**70, 2**128 + 5, 2**200 + 1]),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_the_order_on_the_device_is_that_of_the_host(length, seed, epoch, offset):
    start = epoch * length + offset
    expected = Order(length, seed, True)(start, start + 100)
    found = indices(Position(*divmod(start, length)), 100, length, seed, True)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, 1437])
def test_compiled_and_unshuffled_too(length):
    def call(shuffle):
        return jax.jit(lambda p: indices(p, 4000, length, 7, shuffle))(Position(2, 1))

    start = 2 * length + 1
    for shuffle in (True, False):
        expected = Order(length, 7, shuffle)(start, start + 4000)
        np.testing.assert_array_equal(call(shuffle), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1])
def test_a_traced_seed_gives_the_same_order(seed):
    traced = jax.jit(lambda seed: indices(Position(0, 0), 3000, 1437, seed, True))
    np.testing.assert_array_equal(traced(np.uint32(seed)), Order(1437, seed, True)(0, 3000))
