"""What a hostile program does to a loader: it is right, or raises at once."""

import copy
import gc
import multiprocessing
import os
import pickle
import sys
import threading
import time
import warnings
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cabs_jax import BatchLoader
from tests.cabs_jax.loader.waiting import reading_threads, wait_until


class Records:
    """Integers, with a hook before each read."""

    def __init__(self, length=1000, hook=lambda index: None):
        self.length = length
        self.hook = hook

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.hook(index)
        return index


@pytest.fixture
def eager_switching():
    """Threads take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("records", [False, True])
def test_threads_that_share_a_loader_get_each_example_once(records):
    length, batches = 12_000, []
    source = Records(length) if records else np.arange(length)

    def consume():
        for _ in range(500):
            batches.append(next(loader))

    with BatchLoader(source, 6) as loader:
        threads = [threading.Thread(target=consume) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert loader.get_state()["position"] == length
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(length))


def test_a_size_set_while_another_thread_waits_for_its_batch_is_kept():
    gate = threading.Event()
    with BatchLoader(Records(hook=lambda index: gate.wait(30)), 4) as loader:
        waiter = threading.Thread(target=lambda: next(loader))
        waiter.start()
        wait_until(reading_threads)
        loader.batch_size = 7
        gate.set()
        waiter.join(30)
        assert len(next(loader)) == 7


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("source", [np.arange(9), [1, 2, 3]], ids=["arrays", "records"])
def test_copying_raises_and_says_what_to_do(duplicate, source):
    with BatchLoader(source, 2) as loader:
        next(loader)
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*set_state"):
            duplicate(loader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("records", [False, True])
def test_a_fork_is_told_to_make_a_loader_of_its_own(records):
    source = Records(100) if records else np.arange(100)

    def child(connection):
        try:
            next(loader)
        except RuntimeError as error:
            loader.close()
            with BatchLoader(source, 4, shuffle=False) as own:
                own.set_state(loader.get_state())
                connection.send((str(error), next(own).tolist()))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    with BatchLoader(source, 4, shuffle=False) as loader, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fork of several threads may deadlock
        next(loader)
        process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
        process.start()
        try:
            assert receiver.poll(30)
            message, batch = receiver.recv()
        finally:
            process.kill()
            process.join()
        np.testing.assert_array_equal(next(loader), [4, 5, 6, 7])
    assert "make a loader in each process" in message
    assert batch == [4, 5, 6, 7]


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=3)
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@pytest.mark.slow
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("lag", [0, 2])
@settings(max_examples=150, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(["seed", "length", "shuffle", "position", "batch_size", "batch_sizes"]),
        junk,
        min_size=1,
        max_size=2,
    )
)
@example(changes={"position": 2**64 - 1})
@example(changes={"position": 2**63 - 1})
@example(changes={"batch_sizes": None})
@example(changes={"seed": [0, 0]})
def test_any_state_is_refused_at_once_or_can_be_continued_from(records, lag, changes):
    source = list(range(10)) if records else np.arange(10)
    with BatchLoader(source, 3, lag=lag) as loader:
        next(loader)
        before = loader.get_state()
        try:
            loader.set_state(before | changes)
        except (TypeError, ValueError):
            assert loader.get_state() == before
        else:
            assert loader.get_state()["position"] == (before | changes)["position"]
        batch = next(loader)
        assert np.isin(batch, np.arange(10)).all()


@settings(max_examples=50, deadline=None)
@given(junk)
def test_what_is_no_state_is_refused_at_once(state):
    loader = BatchLoader(np.arange(10), 3)
    with pytest.raises((TypeError, ValueError), match="state"):
        loader.set_state(state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"position": 2**63}, ValueError, "position must be below"),
        ({"position": None}, TypeError, "position must be an integer, got None"),
        ({"position": [3]}, TypeError, "position must be an integer"),
        ({"length": np.array([10, 10])}, ValueError, "saved with length="),
        ({"seed": [0]}, ValueError, "saved with seed="),
        ({"batch_sizes": None}, TypeError, "batch_sizes must be a list"),
        ({"batch_sizes": "16"}, TypeError, "batch_sizes must be a list"),
        ({"batch_sizes": 16}, TypeError, "batch_sizes must be a list"),
        ({"batch_sizes": [None]}, TypeError, "batch_size must be an integer"),
        ({"batch_sizes": [0]}, ValueError, "batch_size must be in"),
    ],
)
def test_bad_states_say_what_is_wrong(changes, error, message):
    loader = BatchLoader(np.arange(10), 3, lag=1)
    with pytest.raises(error, match=message):
        loader.set_state(loader.get_state() | changes)


def test_the_largest_position_can_be_continued_from():
    loader = BatchLoader(np.arange(10), 25)
    loader.set_state(loader.get_state() | {"position": 2**63 - 1})
    batch = next(loader)
    rest = (2**63 - 1) % 10  # of the epoch that the batch begins in
    assert sorted(batch[10 - rest : 20 - rest].tolist()) == list(range(10))


@pytest.mark.slow
def test_close_returns_where_the_source_blocks_for_ever():
    gate, blocked = threading.Event(), threading.Event()

    def hook(index):
        if index == 40:
            blocked.set()
            gate.wait()

    loader = BatchLoader(Records(hook=hook), 16, shuffle=False)
    next(loader)
    blocked.wait(30)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 10
    gate.set()
    np.testing.assert_array_equal(next(loader), np.arange(16, 32))
    loader.close()


@pytest.mark.slow
def test_a_source_is_never_read_by_two_threads_at_once():
    gate, inside, most = threading.Event(), [], []

    def hook(index):
        inside.append(index)
        most.append(len(inside))
        gate.wait(30)
        inside.remove(index)

    loader = BatchLoader(Records(hook=hook), 4)

    def wait():
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: inside)
    loader.close()
    waiter.join(30)
    threading.Timer(0.1, gate.set).start()
    assert len(next(loader)) == 4
    loader.close()
    assert max(most) == 1


def test_a_source_may_close_its_own_loader():
    records = Records(hook=lambda index: loader.close())
    loader = BatchLoader(records, 4)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_source_that_asks_its_own_loader_for_a_batch_raises():
    records = Records(hook=lambda index: next(loader))
    with BatchLoader(records, 4) as loader, pytest.raises(RuntimeError, match="own source"):
        next(loader)


def test_a_padding_function_that_asks_its_own_loader_for_a_batch_raises():
    loader = BatchLoader(np.arange(9), 4, pad_to=lambda size: len(next(loader)[0]))
    with pytest.raises(RuntimeError, match="while this thread is cutting a batch"):
        next(loader)


@pytest.mark.parametrize("first", [jnp.int32(-1), 9], ids=["negative", "beyond the buckets"])
def test_with_lag_a_size_that_cannot_be_cut_is_refused_once(first):
    loader = BatchLoader(np.arange(100), 2, lag=2, shuffle=False, pad_to=(4, 8))
    next(loader)
    loader.batch_size = first
    next(loader)
    loader.batch_size = 3
    next(loader)
    state = loader.get_state()
    with pytest.raises(ValueError, match=r"got .*-1|exceeds the largest bucket"):
        next(loader)
    assert [int(next(loader)[1].sum()) for _ in range(3)] == [3, 3, 3]
    loader.set_state(state)  # the invalid size is no obstacle to going on


@pytest.mark.slow
def test_a_source_that_holds_its_loader_is_collected_with_it():
    gc.freeze()  # so that what is collected below is this test's alone, and soon
    records = Records()
    records.loader = BatchLoader(records, 4)
    next(records.loader)
    wait_until(lambda: reading_threads())
    reference = weakref.ref(records.loader)
    del records

    def is_gone():
        gc.collect()
        return reference() is None and not reading_threads()

    wait_until(is_gone)
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:the batches hold values")
@pytest.mark.parametrize(
    "text",
    [
        np.array(["one", "two", "three"]),
        np.array([b"one", b"two", b"three"]),
        np.array(["one", "two", "three"], object),
        np.array(["one", "two", "three"], np.dtypes.StringDType()),
        [{"text": "one"}, {"text": "two"}, {"text": "three"}],
    ],
    ids=["fixed width", "bytes", "objects", "variable width", "records"],
)
def test_text_is_padded_with_empty_text(text):
    with BatchLoader(text, 3, shuffle=False, pad_to=5) as loader:
        batch, _ = next(loader)
    column = (batch["text"] if isinstance(batch, dict) else batch).tolist()
    assert column[:3] == (
        text.tolist() if isinstance(text, np.ndarray) else ["one", "two", "three"]
    )
    assert column[3:] == [type(column[0])()] * 2


def test_an_exception_with_a_length_is_an_error_like_others():
    class Problems(Exception):  # noqa: N818
        def __len__(self):
            return 0

    def hook(index):
        raise Problems("none listed")

    with BatchLoader(Records(hook=hook), 4) as loader, pytest.raises(Problems, match="none listed"):
        next(loader)


def test_padding_that_would_exhaust_memory_is_refused():
    loader = BatchLoader(np.arange(9), 4, pad_to=lambda size: 2**40)
    with pytest.raises(ValueError, match="at most 16777216 rows, got 1099511627776"):
        next(loader)
