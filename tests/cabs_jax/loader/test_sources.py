"""What counts as a source, and how it is read."""

import collections

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from cabs_jax import BatchLoader


def in_order(source, batch_size=3, **kwargs):
    return BatchLoader(source, batch_size, shuffle=False, **kwargs)


Pair = collections.namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: (x, y),
        lambda x, y: Pair(x, y),
        lambda x, y: ({"x": x}, {"y": y}),
    ],
)
def test_a_pytree_of_arrays_gives_batches_of_its_structure(wrap):
    x, y = np.arange(20.0, dtype=np.float32).reshape(5, 2, 2), np.arange(5, dtype=np.uint8)
    batch = next(in_order(wrap(x, y)))
    expected = wrap(x[:3], y[:3])
    assert type(batch) is type(expected)
    np.testing.assert_equal(batch, expected)


def test_a_single_array_on_host_or_device():
    for array in (np.arange(5, dtype=np.int32), jnp.arange(5, dtype=jnp.int32)):
        batch = next(in_order(array))
        assert isinstance(batch, np.ndarray)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, [0, 1, 2])


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[:, ::2], lambda x: x.T])
def test_views_are_read_in_place(view):
    array = view(np.arange(64).reshape(8, 8))
    np.testing.assert_array_equal(next(in_order(array)), array[:3])


def test_a_memory_mapped_array(tmp_path):
    values = np.arange(40, dtype=np.float32).reshape(20, 2)
    values.tofile(tmp_path / "values.bin")
    mapped = np.memmap(tmp_path / "values.bin", np.float32, "r", shape=(20, 2))
    with BatchLoader((mapped, np.arange(20)), 3, seed=1) as loader:
        for size in (3, 3, 7, 1, 50, 3):
            loader.batch_size = size
            x, index = next(loader)
            np.testing.assert_array_equal(x, values[index])
            assert len(index) == size


def test_a_list_of_records_is_stacked_leaf_by_leaf():
    records = [{"x": np.full(2, i), "label": i, "vector": [i, i + 1]} for i in range(5)]
    with in_order(records) as loader:
        batch = next(loader)
    np.testing.assert_equal(
        batch,
        {
            "x": np.array([[0, 0], [1, 1], [2, 2]]),
            "label": np.arange(3),
            "vector": np.array([[0, 1], [1, 2], [2, 3]]),
        },
    )


class Squares:
    def __init__(self, length=7):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert type(index) is int
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index**2


class BatchedSquares(Squares):
    def __getitem__(self, index):
        raise AssertionError("__getitems__ is there to be used")

    def __getitems__(self, indices):
        return [super(BatchedSquares, self).__getitem__(index) for index in indices]


@pytest.mark.parametrize("source", [Squares(), BatchedSquares()])
def test_an_object_with_length_and_items_is_a_source_of_records(source):
    with in_order(source, 9) as loader:
        np.testing.assert_array_equal(next(loader), [0, 1, 4, 9, 16, 25, 36, 0, 1])


def test_grain_datasets_and_sources():
    dataset = grain.MapDataset.range(10).map(lambda i: {"i": i, "square": i * i})
    with in_order(dataset, 12) as loader:
        batch = next(loader)
    np.testing.assert_array_equal(batch["i"], [*range(10), 0, 1])
    np.testing.assert_array_equal(batch["square"], batch["i"] ** 2)
    with in_order(grain.sources.RangeDataSource(5, 9, 1)) as loader:
        np.testing.assert_array_equal(next(loader), [5, 6, 7])


def test_a_source_too_long_to_store_computes_its_records():
    with BatchLoader(Squares(10**9), batch_size=32) as loader:
        loader.set_state({**loader.get_state(), "position": 3 * 10**9 - 16})
        assert len(set(next(loader).tolist())) > 30


def test_batches_are_never_rewritten(tmp_path):
    values = np.arange(64, dtype=np.float32)
    values.tofile(tmp_path / "values.bin")
    for source in (values, np.memmap(tmp_path / "values.bin", np.float32, "r")):
        with BatchLoader(source, 16) as loader:
            batches = [next(loader) for _ in range(8)]
            copies = [batch.copy() for batch in batches]
            batches[0][:] = -1  # what is handed out belongs to the consumer
            next(loader)
            np.testing.assert_equal(batches[1:], copies[1:])
            np.testing.assert_array_equal(np.sort(np.concatenate(copies[4:])), np.arange(64))
        assert source.min() == 0


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "no examples"),
        (np.zeros((0, 3)), ValueError, "no examples"),
        ((), ValueError, "pytree of arrays"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, ValueError, r"\(3, 2\), \(4,\)"),
        ((np.zeros(3), np.float32(1)), ValueError, "leading axis"),
        ({"x": [1, 2, 3]}, ValueError, "list of records"),
        (7, TypeError, "got int"),
        ("images.npz", TypeError, "got str"),
        (object(), TypeError, "got object"),
        (np.ma.array([1, 2], mask=[0, 1]), TypeError, "mask would be lost"),
    ],
)
def test_what_is_not_a_source_raises(source, error, message):
    with pytest.raises(error, match=message):
        BatchLoader(source)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([np.zeros(2), np.zeros(3)], r"differ in shape: \[\(2,\), \(3,\)\]"),
        ([{"x": 1}, {"y": 1}], "differ in structure"),
        ([1, None], "differ in structure"),
    ],
)
def test_records_that_cannot_be_stacked_raise(records, message):
    with in_order(records, 2) as loader, pytest.raises(ValueError, match=message):
        next(loader)


@pytest.mark.parametrize(
    "value", [np.bytes_(b"\xff\0"), "line\0", ["a", "b\0"], [1, "a"], [[b"a", "b"]]]
)
def test_values_that_numpys_text_would_change_raise(value):
    with in_order([value, value], 2) as loader, pytest.raises(TypeError, match="ends in a NUL or"):
        next(loader)
    columns = BatchLoader(iter([{"x": [value, value]}]), 2, batched=True)
    with columns as loader, pytest.raises(TypeError, match="ends in a NUL or"):
        next(loader)


def test_bytes_among_text_raise():
    with in_order([b"a", "b"], 2) as loader, pytest.raises(ValueError, match="differ in dtype"):
        next(loader)
    with in_order([["ab", "c"], ["a", "bcd"]], 2) as loader, pytest.warns(match="no type for"):
        assert next(loader).tolist() == [["ab", "c"], ["a", "bcd"]]


def test_getitems_that_loses_records_raises():
    class Lossy(Squares):
        def __getitems__(self, indices):
            return indices[1:]

    with in_order(Lossy()) as loader, pytest.raises(ValueError, match="15 records for 16 indices"):
        next(loader)
