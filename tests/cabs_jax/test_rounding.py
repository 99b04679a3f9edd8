import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabs_jax.rounding import check_initial_batch_size, legal_sizes, nearest_legal_size

LARGEST = 2**31 - 1


def nearest(raw, low, high, round_to=1):
    size = nearest_legal_size(jnp.float32(raw), legal_sizes(low, high, round_to))
    assert size.dtype == jnp.int32
    assert size.shape == ()
    return int(size)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (16.5, 16),
        (17.5, 18),
        (18.5, 18),
        (17.51, 18),
        (17.49, 17),
        (31.0, 31),
        (3.0, 16),
        (0.0, 16),
        (-5.0, 16),
        (-math.inf, 16),
        (15.9, 16),
        (2048.5, 2048),
        (2049.0, 2048),
        (1e30, 2048),
        (math.inf, 2048),
    ],
)
def test_rounds_half_to_even_and_clips(raw, expected):
    assert nearest(raw, 16, 2048) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(24.0, 32), (23.9, 16), (40.0, 32), (40.1, 48), (56.0, 64), (1.0, 16), (1e9, 96)],
)
def test_rounds_to_the_nearest_multiple_half_to_even(raw, expected):
    assert nearest(raw, 10, 100, round_to=16) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(32.0, 16), (32.01, 64), (64.0, 64), (127.9, 64), (128.1, 256), (1.0, 16), (math.inf, 256)],
)
def test_rounds_to_the_size_nearest_in_ratio_and_the_smaller_of_two(raw, expected):
    assert nearest(raw, 1, 1000, round_to=(16, 64, 256)) == expected


def test_sizes_of_a_tuple_outside_the_bounds_are_not_used():
    sizes = (8, 16, 32, 64, 128)
    assert nearest(1.0, 16, 64, sizes) == 16
    assert nearest(1e6, 16, 64, sizes) == 64
    assert nearest(1.0, 17, 63, sizes) == 32
    assert nearest(1e6, 17, 63, sizes) == 32


def test_a_single_legal_size_is_always_the_answer():
    for raw in (0.0, 20.0, math.inf):
        assert nearest(raw, 20, 20) == 20
        assert nearest(raw, 16, 31, round_to=16) == 16
        assert nearest(raw, 17, 32, round_to=16) == 32
        assert nearest(raw, 1, 100, round_to=(40,)) == 40


@pytest.mark.parametrize("raw", [2.0**31, 2.0**40, math.inf])
def test_never_overflows_int32(raw):
    assert nearest(raw, 1, LARGEST) == LARGEST
    assert nearest(raw, 1, LARGEST, round_to=1000) == LARGEST // 1000 * 1000
    assert nearest(raw, LARGEST, LARGEST) == LARGEST
    assert nearest(raw, 1, LARGEST, round_to=(1, LARGEST)) == LARGEST
    assert nearest(raw, 1, LARGEST, round_to=LARGEST) == LARGEST


def test_largest_float_below_the_limit_is_kept():
    below = float(np.nextafter(np.float32(2**31), np.float32(0)))
    assert nearest(below, 1, LARGEST) == int(below) == 2147483520


def test_clips_to_bounds_that_float32_cannot_hold():
    assert nearest(1e9, 1, 2**24 + 1) == 2**24 + 1
    assert nearest(1.0, 2**24 + 1, 2**25) == 2**24 + 1


bounds = st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted)


@given(st.floats(0, 400, width=32), bounds, st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_no_legal_multiple_is_nearer(raw, low_high, k):
    low, high = low_high
    legal = [size for size in range(low, high + 1) if size % k == 0]
    if not legal:
        with pytest.raises(ValueError, match=f"round_to={k} lies in \\[{low}, {high}\\]"):
            nearest(raw, low, high, k)
        return
    size = nearest(raw, low, high, k)
    assert size in legal
    assert abs(size - raw) <= min(abs(other - raw) for other in legal) + 1e-4


@pytest.mark.slow
@given(
    st.floats(2**-10, 400, width=32), bounds, st.sets(st.integers(1, 300), min_size=1, max_size=8)
)
@settings(max_examples=50, deadline=None)
def test_no_legal_size_of_a_tuple_is_nearer_in_ratio(raw, low_high, sizes):
    low, high = low_high
    sizes = tuple(sorted(sizes))
    legal = [size for size in sizes if low <= size <= high]
    if not legal:
        with pytest.raises(ValueError, match="none of round_to="):
            nearest(raw, low, high, sizes)
        return
    size = nearest(raw, low, high, sizes)
    assert size in legal
    ratios = {other: abs(math.log(raw / other)) for other in legal}
    assert ratios[size] <= min(ratios.values()) + 1e-6


@pytest.mark.parametrize("round_to", [1, 16, (16, 48, 100)])
def test_traced_bounds_give_the_same_sizes(round_to):
    @jax.jit
    def traced(raw, low, high):
        return nearest_legal_size(raw, legal_sizes(low, high, round_to))

    with jax.numpy_dtype_promotion("strict"):
        for raw in (0.0, 16.5, 40.0, 70.0, math.inf):
            size = traced(jnp.float32(raw), jnp.int32(16), jnp.int32(64))
            assert int(size) == nearest(raw, 16, 64, round_to)


def test_traced_multiple_gives_the_same_sizes():
    traced = jax.jit(lambda raw, k: nearest_legal_size(raw, legal_sizes(10, 100, k)))
    for raw in (0.0, 24.0, 40.0, math.inf):
        assert int(traced(jnp.float32(raw), jnp.int32(16))) == nearest(raw, 10, 100, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 16), "32 and 16"),
        ((0, 16), "min_batch_size.*got 0"),
        ((-4, 16), "min_batch_size.*got -4"),
        ((1, 2**31), "max_batch_size.*got 2147483648"),
        ((16.5, 32), "min_batch_size.*got 16.5"),
        ((16, 32.0), "max_batch_size.*got 32.0"),
        ((16, None), "max_batch_size.*got None"),
        ((16, "64"), "max_batch_size.*got '64'"),
        ((16, 32, 0), "round_to.*got 0"),
        ((16, 32, 2.5), r"round_to.*got 2.5"),
        ((16, 32, ()), r"round_to.*got \(\)"),
        ((16, 32, (16, 16)), r"round_to.*got \(16, 16\)"),
        ((16, 32, (32, 16)), r"round_to.*got \(32, 16\)"),
        ((16, 32, (16, 24.5)), "round_to.*got 24.5"),
        ((16, 32, (0, 16)), "round_to.*got 0"),
        ((17, 31, 16), r"no multiple of round_to=16 lies in \[17, 31\]"),
        ((17, 31, (16, 32)), r"none of round_to=\(16, 32\) lies in \[17, 31\]"),
    ],
)
def test_bad_bounds_and_sizes_are_shown(arguments, message):
    with pytest.raises(ValueError, match=message):
        legal_sizes(*arguments)


def test_edges_are_allowed():
    assert legal_sizes(1, LARGEST) == (1, LARGEST, 1)
    assert legal_sizes(16, 16, 16) == (16, 16, 16)
    assert legal_sizes(np.int64(8), jnp.int32(32), [8, 16]) == (8, 32, (8, 16))


def test_initial_size_is_the_minimum_or_within_the_bounds():
    legal = legal_sizes(16, 64)
    assert check_initial_batch_size(None, legal) == 16
    assert check_initial_batch_size(16, legal) == 16
    assert check_initial_batch_size(64, legal) == 64
    for bad in (15, 65):
        with pytest.raises(ValueError, match=rf"\[16, 64\], got {bad}"):
            check_initial_batch_size(bad, legal)
    with pytest.raises(ValueError, match=r"initial_batch_size.*got 20\.5"):
        check_initial_batch_size(20.5, legal)
