"""The shuffled order is a permutation of each epoch, and looks like a random one."""

import itertools
import math
import time

import numpy as np
import pytest

from cabs_jax.loader.order import BLOCK, Order, shuffled


def epochs(length, count, seed=0):
    positions = np.arange(length * count, dtype=np.uint64)
    return shuffled(positions, length, seed).reshape(count, length)


def chi_square_score(counts, expected):
    """Standard deviations between Pearson's statistic and its mean, for uniform counts."""
    freedom = counts.size - 1
    statistic = np.sum((counts - expected) ** 2) / expected
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 7, 8, 9, 97, 255, 256, 257, 1024, 1025, 60_000, 65_536, 65_537, 10**6]
)
def test_each_epoch_is_a_permutation(length):
    orders = epochs(length, 2 if length > 1000 else 5)
    np.testing.assert_array_equal(
        np.sort(orders, axis=1), np.broadcast_to(range(length), orders.shape)
    )


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_every_order_of_a_short_epoch_is_equally_likely(length):
    expected = 100
    orders = epochs(length, expected * math.factorial(length), seed=1)
    codes = {order: i for i, order in enumerate(itertools.permutations(range(length)))}
    counts = np.bincount([codes[tuple(order)] for order in orders.tolist()], minlength=len(codes))
    assert abs(chi_square_score(counts, expected)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("length", [10, 64, 100, 1000])
def test_every_example_is_equally_likely_at_every_position(length):
    count = 400_000 // length
    orders = epochs(length, count, seed=2)
    cells = np.bincount((orders * length + np.arange(length)).ravel(), minlength=length**2)
    # Rows and columns of the table have fixed sums: (length - 1)**2 degrees of freedom are left.
    statistic = np.sum((cells - count / length) ** 2) / (count / length)
    freedom = (length - 1) ** 2
    assert abs(statistic - freedom) / math.sqrt(2 * freedom) < 4


@pytest.mark.slow
@pytest.mark.parametrize("length", [33, 100, 2000, 60_000])
@pytest.mark.parametrize("lag", [1, 2])
def test_neighbours_are_unrelated(length, lag):
    orders = epochs(length, 1_000_000 // length, seed=3)
    differences = (orders[:, lag:] - orders[:, :-lag]) % length  # uniform on 1, ..., length - 1
    bins = np.linspace(1, length, min(length, 65))[:-1].round()
    counts = np.histogram(differences, [*bins, length])[0]
    widths = np.diff([*bins, length])
    expected = differences.size * widths / (length - 1)
    freedom = len(counts) - 1
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert abs(statistic - freedom) / math.sqrt(2 * freedom) < 4


def test_epochs_and_seeds_have_unrelated_orders():
    length = 1000
    orders = np.concatenate([epochs(length, 20, seed) for seed in range(20)])
    correlations = np.corrcoef(orders)[~np.eye(len(orders), dtype=bool)]
    assert np.abs(correlations).max() < 6 / math.sqrt(length)
    np.testing.assert_allclose(correlations.std(), 1 / math.sqrt(length), rtol=0.05)


def test_a_far_position_of_a_huge_source_is_reached_at_once():
    started = time.perf_counter()
    indices = Order(10**9, seed=0, shuffle=True)(7 * 10**9 + 123, 7 * 10**9 + 223)
    assert time.perf_counter() - started < 1
    assert len(set(indices.tolist())) == 100
    assert 0 <= indices.min() < 10**9 / 4 < 3 * 10**9 / 4 < indices.max() < 10**9


def test_lengths_beyond_32_bits():
    indices = shuffled(np.arange(1000, dtype=np.uint64), 10**13, seed=0)
    assert len(set(indices.tolist())) == 1000
    assert 10**13 * 0.99 < indices.max() < 10**13


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_slice_agrees_with_the_whole_stream(shuffle):
    length = 70
    whole = Order(length, 5, shuffle)(0, 4 * BLOCK)
    order = Order(length, 5, shuffle)
    for start, stop in [(0, 3), (3, 500), (500, 500 + 2 * BLOCK), (BLOCK - 1, BLOCK + 1), (69, 71)]:
        np.testing.assert_array_equal(order(start, stop), whole[start:stop])


def test_strided_orders_share_the_stream():
    whole = Order(11, 0, True)(0, 90)
    for offset in range(3):
        np.testing.assert_array_equal(Order(11, 0, True, offset, 3)(2, 30), whole[offset::3][2:])
