"""With `lag`, sizes take effect late, so that cutting a batch never waits for the last step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabs_jax import BatchLoader


def lengths(loader, sizes):
    """Lengths of the batches, `sizes[k]` being set after batch k."""
    result = []
    for size in sizes:
        result.append(len(next(loader)))
        loader.batch_size = size
    return result


@pytest.mark.parametrize(
    ("lag", "expected"),
    [
        (0, [1, 2, 3, 4, 5, 6]),
        (1, [1, 1, 2, 3, 4, 5]),
        (2, [1, 1, 1, 2, 3, 4]),
    ],
)
def test_a_size_takes_effect_lag_batches_late(lag, expected):
    loader = BatchLoader(np.arange(100), 1, lag=lag)
    assert lengths(loader, [2, 3, 4, 5, 6, 7]) == expected


def test_the_size_of_the_step_in_flight_is_not_read():
    loader = BatchLoader(np.arange(100), 4, lag=1)
    next(loader)
    loader.batch_size = jnp.int32(-1)  # reading it would raise
    assert len(next(loader)) == 4
    with pytest.raises(ValueError, match="-1"):
        next(loader)


def test_the_size_survives_the_donation_of_the_state_it_came_from():
    step = jax.jit(lambda size: size + 1, donate_argnums=0)
    loader = BatchLoader(np.arange(100), 1, lag=1)
    size = jnp.int32(1)
    seen = []
    for _ in range(5):
        seen.append(len(next(loader)))
        donated, size = size, step(size)
        assert donated.is_deleted()
        loader.batch_size = size
    assert seen == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("lag", [1, 3])
def test_resuming_keeps_the_sizes_that_are_still_to_take_effect(lag):
    loader, resumed = (BatchLoader(np.arange(100), 1, lag=lag) for _ in range(2))
    lengths(loader, map(jnp.int32, [2, 3, 4, 5]))
    state = json.loads(json.dumps(loader.get_state()))
    resumed.set_state(state)
    resumed.batch_size = 5
    assert lengths(resumed, [6, 7, 8, 9]) == lengths(loader, [6, 7, 8, 9])
    assert resumed.get_state() == loader.get_state()


def test_resuming_with_another_lag():
    loader = BatchLoader(np.arange(100), 1, lag=2)
    lengths(loader, [2, 3, 4])
    for lag, expected in [(0, [4, 5]), (1, [3, 4]), (3, [2, 2])]:
        resumed = BatchLoader(np.arange(100), 4, lag=lag)
        resumed.set_state(loader.get_state())
        assert lengths(resumed, [5, 6]) == expected


def test_a_negative_lag_raises():
    with pytest.raises(ValueError, match="lag must be non-negative, got -1"):
        BatchLoader(np.arange(3), lag=-1)
