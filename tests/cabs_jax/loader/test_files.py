"""Arrays in files are read slice by slice."""

import threading

import numpy as np
import pytest

from cabs_jax import BatchLoader


class InFile:
    """An array as h5py's: sliced with increasing bounds, never read whole."""

    def __init__(self, values, chunks):
        self.values = values
        self.shape = values.shape
        self.dtype = values.dtype
        self.chunks = chunks
        self.read = []

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        assert type(rows.start) is type(rows.stop) is int
        self.read.append(rows.stop - rows.start)
        return self.values[rows]

    def __array__(self, *_, **__):
        raise AssertionError("the array would be read whole")


VALUES = np.arange(3000, dtype=np.float32).reshape(1000, 3)


def check(array, threads=1, values=VALUES):
    with (
        BatchLoader({"x": array, "i": np.arange(1000)}, 16, num_threads=threads) as loader,
        BatchLoader({"x": values, "i": np.arange(1000)}, 16) as plain,
    ):
        for size in (16, 3, 700, 64):
            loader.batch_size = plain.batch_size = size
            np.testing.assert_equal(next(loader), next(plain))


@pytest.mark.parametrize("chunks", [None, (1, 3), (50, 3), (1000, 3)])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_slice_is_larger_than_a_chunk(chunks, threads):
    array = InFile(VALUES, chunks)
    check(array, threads)
    assert max(array.read) <= (chunks or (16,))[0]


def test_labels_are_read_from_the_file_too():
    labels = np.arange(1000)
    array = InFile(labels, (50,))
    check(array, values=labels)
    assert max(array.read) <= 50


def test_each_chunk_is_read_once_a_block_in_its_own_order():
    array = InFile(VALUES, (50, 3))
    with BatchLoader(array, 100, shuffle=False) as loader:
        next(loader)
    assert len(array.read) <= 6  # two chunks for each block, of which three are read at most


def test_an_array_alone_padded():
    with BatchLoader(InFile(VALUES, (8, 3)), 5, shuffle=False, pad_to=8) as loader:
        batch, mask = next(loader)
    np.testing.assert_array_equal(batch[mask], VALUES[:5])
    assert not batch[~mask].any()


def test_a_memory_mapped_array_is_read_ahead_of_the_batches(tmp_path):
    np.save(tmp_path / "values.npy", VALUES)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    check(mapped[:, :])
    for array, threads in ((mapped[:, :], 1), (VALUES, 0)):
        with BatchLoader(array, 16) as loader:
            next(loader)
            names = [thread.name for thread in threading.enumerate()]
        assert sum("read-ahead" in name for name in names) == threads


@pytest.mark.parametrize("chunks", [None, (64, 3)])
def test_h5py(tmp_path, chunks):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "values.h5", "w") as file:
        check(file.create_dataset("x", data=VALUES, chunks=chunks))


def test_zarr():
    zarr = pytest.importorskip("zarr")
    check(zarr.array(VALUES, chunks=(64, 3)))
