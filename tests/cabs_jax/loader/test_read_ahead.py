"""The background thread: ahead of need, loud about errors, gone when it should be."""

import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cabs_jax import BatchLoader
from tests.cabs_jax.loader.waiting import reading_threads, wait_until


class Records:
    """`length` integers, with a log of what was read and a hook before each read."""

    def __init__(self, length=1000, hook=lambda index: None):
        self.length = length
        self.read = []
        self.hook = hook

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.hook(index)
        self.read.append(index)
        return index


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    yield
    if reading_threads():
        gc.collect()  # takes a second where much was compiled before
    wait_until(lambda: not reading_threads())


def test_examples_are_read_before_they_are_asked_for_so_that_any_size_can_be_cut():
    records = Records()
    with BatchLoader(records, 32, shuffle=False) as loader:
        next(loader)
        wait_until(lambda: len(records.read) >= 3 * 32)
        gate = threading.Event()
        records.hook = lambda index: gate.wait()
        for size in (5, 40, 19):  # 64 examples in all, none of which waits for the source
            loader.batch_size = size
            assert len(next(loader)) == size
        gate.set()


def test_reading_ahead_is_bounded_and_reads_each_example_once():
    records = Records()
    with BatchLoader(records, 32, shuffle=False) as loader:
        for _ in range(5):
            next(loader)
            time.sleep(0.01)
            assert len(records.read) <= loader.get_state()["position"] + 3 * 32
    assert records.read == list(range(len(records.read)))


def test_arrays_in_memory_need_no_thread():
    next(BatchLoader(np.arange(10)))
    assert not reading_threads()


def test_an_error_in_the_source_surfaces_after_the_examples_before_it():
    def hook(index):
        if index == 40:
            raise OSError("bad sector")

    records = Records(hook=hook)
    with BatchLoader(records, 16, shuffle=False) as loader:
        assert next(loader)[-1] == 15
        assert next(loader)[-1] == 31
        for _ in range(2):
            with pytest.raises(OSError, match="bad sector"):
                next(loader)
        loader.batch_size = 4
        records.hook = lambda index: None
        np.testing.assert_array_equal(next(loader), [32, 33, 34, 35])


def test_stop_iteration_in_the_source_does_not_end_the_loop():
    def hook(index):
        raise StopIteration

    with BatchLoader(Records(hook=hook)) as loader, pytest.raises(RuntimeError, match="StopIter"):
        next(loader)


def test_the_thread_ends_with_the_with_block_and_starts_again_on_demand():
    records = Records()
    with BatchLoader(records, 4, shuffle=False) as loader:
        next(loader)
        assert len(reading_threads()) == 1
    assert not reading_threads()
    np.testing.assert_array_equal(next(loader), [4, 5, 6, 7])
    loader.close()
    loader.close()


@pytest.mark.slow
def test_the_thread_ends_with_the_loader():
    loader = BatchLoader(Records())
    next(loader)
    assert reading_threads()
    del loader  # the fixture waits for the thread


@pytest.fixture
def interruptible():
    """Programs started in the background ignore SIGINT, and so would this test."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_interrupts_the_wait_and_loses_no_example():
    gate = threading.Event()
    records = Records(hook=lambda index: gate.wait() if index == 40 else None)
    with BatchLoader(records, 16, shuffle=False) as loader:
        next(loader)
        next(loader)
        main = threading.main_thread().ident
        threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        gate.set()
        np.testing.assert_array_equal(next(loader), np.arange(32, 48))


def test_closing_the_loader_ends_a_wait_in_another_thread():
    gate, errors = threading.Event(), []
    loader = BatchLoader(Records(hook=lambda index: gate.wait()), 4, shuffle=False)

    def wait():
        with pytest.raises(RuntimeError, match="the loader was closed") as error:
            next(loader)
        errors.append(error)

    def close():
        while waiter.is_alive():  # once it waits, this takes as long as the record being read
            loader.close()

    waiter, closer = threading.Thread(target=wait), threading.Thread(target=close)
    waiter.start()
    closer.start()
    waiter.join(30)
    gate.set()
    closer.join(30)
    assert len(errors) == 1


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_quietly():
    program = (
        "import cabs_jax\n"
        "loader = cabs_jax.BatchLoader(list(range(100)))\n"
        "print(len(next(loader)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"16\n", b"")
