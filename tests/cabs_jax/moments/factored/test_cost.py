import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs_jax.moments.factored import cost
from cabs_jax.moments.target import COSTS, Target

size = st.integers(1, 4096)
targets = st.sampled_from(sorted(COSTS)).map(Target)


@given(targets, st.booleans(), st.booleans(), st.integers(1, 8), size, size, size)
def test_direct_form_is_chosen_from_some_number_of_positions_on(
    target, rounded, one_hot, groups, positions, p, q
):
    def direct(positions):
        sizes = (groups, positions, p, q)
        return cost.prefers_direct(sizes, target, rounded=rounded, one_hot=one_hot)

    if direct(positions):
        assert direct(positions + 1)
    assert not direct(1)
    assert direct(math.isqrt(target.costs.rounded_traffic * p * q) + 2)


@pytest.mark.parametrize(
    ("sizes", "platform", "options", "direct"),
    [
        ((1, 196, 800, 64), "tpu", {"rounded": True, "patches": True}, True),  # conv2 of mnist_2c2d
        ((1, 25, 864, 128), "tpu", {"rounded": True, "patches": True}, True),  # 0.4 times Gram
        ((1, 16, 9 * 512, 2048), "tpu", {"rounded": True, "patches": True}, False),
        ((1, 128, 1024, 1024), "tpu", {"rounded": True}, False),  # 3.3 times plain, Gram 1.05
        ((1, 512, 1024, 1024), "tpu", {"rounded": True}, True),  # 1.7 times plain, Gram 1.9
        ((1, 128, 32768, 512), "tpu", {"one_hot": True}, False),  # 578 µs, Gram 19
        ((1, 256, 8192, 64), "cpu", {"one_hot": True}, False),  # 97 ms, Gram 33
        ((1, 512, 1000, 64), "cpu", {"one_hot": True}, True),  # 1.2 ms, sorted 1.8, Gram 15
    ],
)
def test_what_was_measured_to_be_cheaper_is_chosen(sizes, platform, options, direct):
    assert cost.prefers_direct(sizes, Target(platform), **options) is direct


def test_many_look_ups_are_sorted_where_that_was_measured_to_be_quicker():
    def sorts(positions, rows, platform="cpu"):
        return cost.prefers_sorting((1, positions, rows, 64), Target(platform))

    assert sorts(1024, 8192)  # 2 ms, Gram 41
    assert not sorts(128, 8192)  # 1.7 ms, Gram 1.7
    assert not sorts(512, 1000)  # 1.8 ms, direct 1.2
    assert not sorts(1024, 8192, "tpu")
    assert not sorts(2**12, 2**19)  # their places and positions do not fit 32 bits


@given(st.integers(1, 8), size, size, size)
def test_memory_is_that_of_factors_and_of_gradients_or_inner_products(groups, positions, p, q):
    factors = 4 * groups * positions * (p + q)
    sizes = (groups, positions, p, q)
    assert cost.norm_bytes(sizes, direct=True) - factors == 4 * groups * p * q
    assert cost.norm_bytes(sizes, direct=False) - factors == 8 * groups * positions**2
