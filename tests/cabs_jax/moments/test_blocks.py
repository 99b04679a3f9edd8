"""What is done block by block is what is done at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs_jax.moments import blocks
from cabs_jax.moments.target import COSTS, Target

BUDGET = COSTS["cpu"].budget
CPU = Target("cpu", lanes=8)


@given(st.integers(1, 5000), st.integers(0, 2**36), st.integers(1, 8))
def test_blocks_hold_the_batch_and_fit_the_budget(examples, bytes_per_example, unit):
    examples *= unit
    size, count = blocks.fitting(examples, bytes_per_example, BUDGET, unit)
    assert size % unit == 0
    assert examples <= size * count < examples + count * unit
    assert size == unit or size * bytes_per_example <= BUDGET


@given(st.integers(1, 1000))
def test_what_fits_is_one_block(examples):
    assert blocks.fitting(examples, BUDGET // examples, BUDGET) == (examples, 1)


def squares_and_rows(x):
    return {"sum": x * x}, jnp.sum(x, axis=1)


@pytest.mark.parametrize("lanes", [1, 4, 5])
@pytest.mark.parametrize("size", [4, 8, 24])
def test_sums_and_rows_are_those_of_the_whole(size, lanes):
    x = jnp.arange(72.0).reshape(24, 3)

    def function(x):
        return jnp.sum(x, axis=0), {"row": x[:, 0], "seen": jnp.full(x.shape[0], x.shape[0])}

    sums, rows = jax.jit(lambda x: blocks.over_blocks(function, x, size, lanes=lanes))(x)
    np.testing.assert_array_equal(sums, jnp.sum(x, axis=0))
    np.testing.assert_array_equal(rows["row"], x[:, 0])
    assert set(np.asarray(rows["seen"])) == {size}


@pytest.mark.parametrize(("lanes", "together"), [(1, [0, 1, 2, 3]), (2, [0, 1, 4, 5])])
def test_a_block_takes_an_equal_part_of_every_lane(lanes, together):
    def function(x):
        return (), jnp.full(x.shape, jnp.min(x))

    _, first = blocks.over_blocks(function, jnp.arange(8), 4, lanes=lanes)
    assert np.flatnonzero(first == 0).tolist() == together


@pytest.mark.parametrize(("keep", "visited"), [(0, 0), (1, 4), (4, 4), (5, 8), (12, 12)])
def test_blocks_that_are_all_padding_at_the_end_are_skipped(keep, visited):
    def function(x):
        return jnp.sum(jnp.ones_like(x)), x + 1

    kept = jnp.arange(12) < keep
    count, rows = jax.jit(lambda k: blocks.over_blocks(function, jnp.zeros(12), 4, keep=k))(kept)
    assert count == visited
    np.testing.assert_array_equal(rows, jnp.arange(12) < visited)


@pytest.mark.parametrize("examples", [1, 8, 16, 21, 24])
@pytest.mark.parametrize("bytes_per_example", [1, 2**21, 2**40])
def test_sums_in_cache_are_those_of_the_whole(examples, bytes_per_example):
    x = jnp.arange(1.0, examples * 3 + 1).reshape(examples, 3)
    sums, rows = jax.jit(
        lambda x: blocks.sum_in_cache(squares_and_rows, x, bytes_per_example, CPU)
    )(x)
    np.testing.assert_allclose(sums["sum"], jnp.sum(x * x, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(rows, jnp.sum(x, axis=1))


def test_sums_in_cache_really_work_in_blocks():
    seen = []

    def function(x):
        seen.append(x.shape[0])
        return (), x

    blocks.sum_in_cache(function, jnp.ones((64, 3)), BUDGET // 8, CPU)
    assert set(seen) == {8}


@pytest.mark.parametrize(("platform", "size"), [("cpu", 8), ("tpu", 32), ("gpu", 32)])
def test_devices_with_memory_of_their_own_take_larger_blocks_together(platform, size):
    seen = []

    def function(x):
        seen.append(x.shape[0])
        return (), x

    needed = COSTS[platform].budget // 8
    blocks.sum_in_cache(function, jnp.ones((64, 3)), needed, Target(platform, lanes=4))
    assert set(seen) == {size}
