"""Buckets waste little, and padded batches hold their examples, then zeros."""

import numpy as np
import pytest

import cabs_jax
from cabs_jax import BatchLoader


def test_default_buckets_waste_at_most_15_percent_with_at_most_16_shapes():
    buckets = np.array(cabs_jax.buckets())
    assert len(buckets) <= 16
    assert buckets[0] == 16
    assert buckets[-1] == 2048
    sizes = np.arange(16, 2049)
    weights = 1 / sizes / np.sum(1 / sizes)  # uniform in log m
    rows = buckets[np.searchsorted(buckets, sizes)]
    assert np.sum(weights * (rows - sizes) / rows) <= 0.15  # each step counts the same
    assert np.sum(weights * (rows - sizes)) / np.sum(weights * rows) <= 0.15  # each row does


@pytest.mark.parametrize("multiple_of", [1, 6, 32])
def test_buckets_are_increasing_multiples_that_cover_the_range(multiple_of):
    sizes = cabs_jax.buckets(10, 1000, count=9, multiple_of=multiple_of)
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 9
    assert all(size % multiple_of == 0 for size in sizes)
    assert 1000 <= sizes[-1] < 1000 + multiple_of


def test_one_size_is_one_bucket():
    assert cabs_jax.buckets(32, 32) == (32,)


def test_buckets_may_begin_at_one_example():
    assert cabs_jax.buckets(1, 4, count=3, multiple_of=1) == (1, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((0, 8), {}), ((9, 8), {}), ((8, 9), {"count": 1}), ((8, 9), {"multiple_of": 0})],
)
def test_bad_bucket_arguments_raise(arguments, options):
    with pytest.raises(ValueError, match="got"):
        cabs_jax.buckets(*arguments, **options)


@pytest.mark.parametrize("arguments", [(16.5, 100), (16, 100.0), ("16", 100)])
def test_buckets_of_anything_but_integers_raise(arguments):
    with pytest.raises(TypeError, match="integer"):
        cabs_jax.buckets(*arguments)


def sources(tmp_path):
    values = np.arange(1, 41, dtype=np.float32).reshape(20, 2)
    values.tofile(tmp_path / "values.bin")
    return {
        "arrays": {"x": values},
        "view": {"x": np.repeat(values, 2, axis=1)[:, ::2]},
        "records": [{"x": value} for value in values],
        "mapped": {"x": np.memmap(tmp_path / "values.bin", np.float32, "r", shape=(20, 2))},
    }


@pytest.mark.parametrize("kind", ["arrays", "view", "records", "mapped"])
@pytest.mark.parametrize(
    "pad_to", [(4, 8, 32), 32, lambda size: 2 * size], ids=["tuple", "int", "function"]
)
def test_a_padded_batch_is_the_unpadded_one_followed_by_zeros(kind, pad_to, tmp_path):
    source = sources(tmp_path)[kind]
    expected_rows = {
        tuple: lambda size: next(rows for rows in (4, 8, 32) if rows >= size),
        int: lambda size: 32,
    }.get(type(pad_to), pad_to)
    with BatchLoader(source, seed=2, pad_to=pad_to) as padded, BatchLoader(source, seed=2) as plain:
        for size in (3, 4, 5, 31, 8, 1):
            padded.batch_size = plain.batch_size = size
            batch, mask = next(padded)
            rows = expected_rows(size)
            assert batch["x"].shape == (rows, 2)
            assert batch["x"].dtype == np.float32
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, np.arange(rows) < size)
            np.testing.assert_array_equal(batch["x"][:size], next(plain)["x"])
            assert not batch["x"][size:].any()


def test_a_size_beyond_the_largest_bucket_raises_and_loses_nothing():
    loader = BatchLoader(np.arange(20), 9, shuffle=False, pad_to=(4, 8))
    with pytest.raises(ValueError, match="batch size 9 exceeds the largest bucket 8"):
        next(loader)
    loader.batch_size = 3
    np.testing.assert_array_equal(next(loader)[0], [0, 1, 2, 0])


def test_a_function_that_shrinks_the_batch_raises():
    with pytest.raises(ValueError, match=r"at least the batch size 9 .* got 8"):
        next(BatchLoader(np.arange(20), 9, pad_to=lambda size: 8))


@pytest.mark.parametrize(
    ("pad_to", "error"),
    [
        ((), ValueError),
        ((8, 8), ValueError),
        ((8, 4), ValueError),
        (0, ValueError),
        (8.0, TypeError),
    ],
)
def test_bad_buckets_raise_at_construction(pad_to, error):
    with pytest.raises(error):
        BatchLoader(np.arange(20), pad_to=pad_to)
