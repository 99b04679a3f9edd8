"""The stream of batches: nothing dropped, any size, resumable anywhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cabs_jax
from cabs_jax import BatchLoader


def take(loader, sizes):
    batches = []
    for size in sizes:
        loader.batch_size = size
        batches.append(next(loader))
    return batches


@pytest.mark.parametrize("records", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    seed=st.integers(0, 2**70),
    shuffle=st.booleans(),
)
def test_each_example_appears_exactly_once_per_epoch_whatever_the_sizes(
    records, length, sizes, seed, shuffle
):
    source = list(range(length)) if records else np.arange(length)
    with BatchLoader(source, seed=seed, shuffle=shuffle) as loader:
        batches = take(loader, sizes)
    assert [len(batch) for batch in batches] == sizes
    stream = np.concatenate(batches)
    for start in range(0, len(stream), length):
        epoch = stream[start : start + length]
        assert len(set(epoch.tolist())) == len(epoch)
        if not shuffle:
            np.testing.assert_array_equal(epoch, np.arange(len(epoch)))


@pytest.mark.parametrize("records", [False, True])
@settings(max_examples=20, deadline=None)
@given(
    before=st.lists(st.integers(1, 60), max_size=6),
    after=st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_resuming_continues_with_the_very_next_example(records, before, after):
    source = list(range(37)) if records else np.arange(37)
    with BatchLoader(source, seed=3) as loader, BatchLoader(source, seed=3) as resumed:
        take(loader, before)
        state = json.loads(json.dumps(loader.get_state()))
        expected = np.concatenate(take(loader, after))
        next(resumed)  # what was loaded before is forgotten
        resumed.set_state(state)
        assert resumed.get_state() == state
        np.testing.assert_array_equal(take(resumed, [sum(after)])[0], expected)


def test_the_stream_depends_on_the_seed_alone():
    first, again, other = (BatchLoader(np.arange(50), 50, seed) for seed in (0, 0, 1))
    order = next(first)
    np.testing.assert_array_equal(next(again), order)
    assert np.any(next(other) != order)
    assert np.any(next(first) != order)


def test_records_and_arrays_share_the_order():
    array = np.arange(50)
    with BatchLoader(array.tolist(), seed=4) as records:
        for batch in take(BatchLoader(array, seed=4), [16, 3, 120]):
            np.testing.assert_array_equal(take(records, [len(batch)])[0], batch)


def test_it_is_its_own_endless_iterator():
    loader = BatchLoader(np.arange(3), 2)
    assert iter(loader) is loader
    assert sum(len(batch) for batch, _ in zip(loader, range(100), strict=False)) == 200


def test_batch_size_takes_integers_of_every_kind():
    loader = BatchLoader(np.arange(10))
    sizes = [3, np.int64(4), np.array(5), jnp.int32(6), jax.jit(lambda: jnp.uint8(7))()]
    assert [len(batch) for batch in take(loader, sizes)] == [3, 4, 5, 6, 7]
    assert loader.batch_size == 7


def test_the_size_can_come_straight_from_the_optimizer():
    loader = BatchLoader(np.arange(10))
    state = cabs_jax.cabs(0.1, min_batch_size=5).init({"w": jnp.zeros(3)})
    loader.batch_size = cabs_jax.batch_size(state)
    assert len(next(loader)) == 5


def test_the_array_a_size_was_read_from_may_be_donated_afterwards():
    loader, size = BatchLoader(np.arange(10), 1), jnp.int32(3)
    loader.batch_size = size
    assert len(next(loader)) == 3
    jax.jit(lambda size: size + 1, donate_argnums=0)(size)
    assert size.is_deleted()
    assert len(next(loader)) == 3


def test_a_device_array_is_only_read_when_the_next_batch_is_cut():
    loader = BatchLoader(np.arange(10), 4)
    next(loader)
    size = jnp.int32(-1)
    loader.batch_size = size  # not read, hence no complaint
    assert loader.batch_size is size
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 16777216\], got .*-1"):
        next(loader)
    loader.batch_size = 4
    np.testing.assert_array_equal(next(loader), take(BatchLoader(np.arange(10)), [4, 4])[1])


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (2**31, ValueError),
        (True, ValueError),
        (16.0, TypeError),
        (float("nan"), TypeError),
        ("16", TypeError),
        (None, TypeError),
        (np.array([3, 4]), TypeError),
        (jnp.float32(16), TypeError),
        (jnp.array([16]), TypeError),
    ],
)
def test_sizes_that_are_none_raise_where_they_are_set(size, error):
    with pytest.raises(error, match="batch_size must be"):
        BatchLoader(np.arange(10), size)
    loader = BatchLoader(np.arange(10), 4)
    with pytest.raises(error, match="batch_size must be"):
        loader.batch_size = size
    assert len(next(loader)) == 4


def test_setting_the_size_inside_jit_raises():
    loader = BatchLoader(np.arange(10))

    def step(size):
        loader.batch_size = size

    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(step)(3)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_bad_seeds_raise(seed, error):
    with pytest.raises(error, match=f"seed must be .* got {seed}"):
        BatchLoader(np.arange(3), seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "saved with seed=1, this loader has seed=0"),
        ({"length": 11}, "length=11"),
        ({"shuffle": False}, "shuffle=False"),
        ({"position": -1}, "non-negative, got -1"),
    ],
)
def test_the_state_of_another_stream_is_refused(change, message):
    loader = BatchLoader(np.arange(10), 4)
    next(loader)
    with pytest.raises(ValueError, match=message):
        loader.set_state(loader.get_state() | change)
    assert loader.get_state()["position"] == 4


def test_an_incomplete_state_is_refused():
    loader = BatchLoader(np.arange(10))
    with pytest.raises(ValueError, match=r"state lacks \['position', 'shuffle'\]"):
        loader.set_state({"seed": 0, "length": 10})


def test_a_state_holds_the_size_and_restores_it():
    loader, resumed = BatchLoader(np.arange(10), 4), BatchLoader(np.arange(10))
    loader.batch_size = jnp.int32(7)
    state = json.loads(json.dumps(loader.get_state()))
    assert state["batch_size"] == 7
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed), next(loader))


def test_a_state_without_a_size_still_loads_and_leaves_the_size():
    loader = BatchLoader(np.arange(10), 4)
    loader.set_state({"seed": 0, "length": 10, "shuffle": True, "position": 3})
    assert (loader.batch_size, loader.examples_seen) == (4, 3)


def test_a_size_that_no_batch_can_have_is_not_saved():
    loader = BatchLoader(np.arange(10), 4)
    loader.batch_size = jnp.int32(-1)
    assert "batch_size" not in loader.get_state()
