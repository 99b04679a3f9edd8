"""Several threads for slow records: the same batches, sooner."""

import threading
import time

import numpy as np
import pytest

from cabs_jax import BatchLoader


class Records:
    def __init__(self, hook, length=1000, together=False):
        self.length = length
        self.hook = hook
        self.read = []
        if together:
            self.__getitems__ = lambda indices: [self[index] for index in indices]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.hook(index)
        self.read.append(index)
        return index


@pytest.mark.parametrize("threads", [2, 5, 40])
@pytest.mark.parametrize("together", [False, True])
def test_the_order_is_that_of_one_thread_and_each_example_is_read_once(threads, together):
    def hook(index):
        time.sleep(index % 7 / 5000)

    records = Records(hook, together=together)
    with BatchLoader(records, 16, seed=3, num_threads=threads) as loader:
        plain = BatchLoader(np.arange(1000), 16, seed=3)
        for loader.batch_size in (16, 100, 1, 30):
            plain.batch_size = loader.batch_size
            np.testing.assert_array_equal(next(loader), next(plain))
    assert len(set(records.read)) == len(records.read)


def test_all_threads_read_at_once():
    barrier = threading.Barrier(8)
    with BatchLoader(Records(lambda index: barrier.wait(30)), num_threads=8) as loader:
        assert len(next(loader)) == 16
        barrier.abort()  # lets those go that read ahead


def test_an_error_comes_after_the_examples_before_it():
    def hook(index):
        if index == 40:
            raise OSError("bad sector")

    records = Records(hook)
    with BatchLoader(records, 16, shuffle=False, num_threads=4) as loader:
        assert next(loader)[-1] == 15
        assert next(loader)[-1] == 31
        for _ in range(2):
            with pytest.raises(OSError, match="bad sector"):
                next(loader)
        records.hook = lambda index: None
        np.testing.assert_array_equal(next(loader), np.arange(32, 48))


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("together", [False, True])
def test_a_small_batch_after_a_large_one_waits_for_no_large_block(threads, together):
    gate = threading.Event()
    records = Records(lambda index: index < 1300 or gate.wait(60), 10_000, together)
    with BatchLoader(records, 1024, shuffle=False, num_threads=threads) as loader:
        next(loader)
        loader.batch_size = 16
        np.testing.assert_array_equal(next(loader), np.arange(1024, 1040))
        assert not gate.is_set()
        gate.set()


@pytest.mark.parametrize("threads", [1, 8])
def test_reading_ahead_is_bounded(threads):
    records = Records(lambda index: None, 10**6)
    with BatchLoader(records, 32, num_threads=threads) as loader:
        for _ in range(20):
            next(loader)
            time.sleep(0.005)
            assert len(records.read) <= loader.examples_seen + 2 * 32 + 16


def test_a_number_of_threads_that_is_none():
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        BatchLoader([1], num_threads=0)
