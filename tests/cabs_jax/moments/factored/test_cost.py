import math

from hypothesis import given
from hypothesis import strategies as st

from cabs_jax.moments.factored import cost

size = st.integers(1, 4096)


@given(st.integers(1, 8), size, size, size)
def test_direct_form_is_chosen_from_some_number_of_positions_on(groups, positions, p, q):
    if cost.prefers_direct((groups, positions, p, q)):
        assert cost.prefers_direct((groups, positions + 1, p, q))
    assert not cost.prefers_direct((groups, 1, p, q))
    enough = math.isqrt(cost.TRAFFIC * p * q) + 2
    assert cost.prefers_direct((groups, enough, p, q))


@given(st.integers(1, 8), size, size, size)
def test_memory_is_that_of_factors_and_of_gradients_or_inner_products(groups, positions, p, q):
    factors = 4 * groups * positions * (p + q)
    sizes = (groups, positions, p, q)
    assert cost.norm_bytes(sizes, direct=True) - factors == 4 * groups * p * q
    assert cost.norm_bytes(sizes, direct=False) - factors == 8 * groups * positions**2
