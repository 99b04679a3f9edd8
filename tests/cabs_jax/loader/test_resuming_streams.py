"""A stream goes on with the very example that comes next, or says that it cannot."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabs_jax import BatchLoader
from tests.cabs_jax.loader.streams import Passes, grain_stream


class Resumable:
    """States as Hugging Face's streaming data sets keep them: the data set holds that of its pass.

    The dictionary is its own and changes as it goes on.
    """

    def __init__(self, length=100, size=None):
        self.length = length
        self.size = size
        self.state = {"index": 0}
        self.start = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.start = state["index"]

    def __iter__(self):
        start, self.start = self.start, 0
        self.state["index"] = start
        step = self.size or 1
        for index in range(start, self.length, step):
            self.state["index"] = index + step
            values = np.arange(index, min(index + step, self.length))
            yield values if self.size else values[0]


STREAMS = {
    "methods of the iterable": lambda: Resumable(),
    "batches": lambda: Resumable(size=7),
    "methods of the iterator": lambda: grain_stream(),
    "batches of Grain": lambda: grain_stream(size=7),
    "an iterator": lambda: iter(grain_stream()),
}
SLOW = {  # Grain takes its time to start
    "methods of the iterator": pytest.mark.slow,
    "batches of Grain": pytest.mark.exhaustive,
    "an iterator": pytest.mark.slow,
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in STREAMS],
)
@settings(max_examples=25, deadline=None)
@given(
    before=st.lists(st.integers(1, 60), max_size=5),
    after=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    lag=st.integers(0, 1),
)
def test_resuming_continues_with_the_very_next_example(kind, before, after, lag):
    def make():
        return BatchLoader(STREAMS[kind](), batched="batches" in kind, lag=lag)

    def take(loader, sizes):
        got = []
        for loader.batch_size in sizes:
            got += next(loader, np.zeros(0)).tolist()
        return got

    with make() as loader, make() as resumed:
        take(loader, before)
        state = json.loads(json.dumps(loader.get_state()))
        expected = take(loader, after)
        take(resumed, [13])  # what was loaded before is forgotten
        resumed.set_state(state)
        assert resumed.examples_seen == state["position"]
        assert resumed.batch_size == state["batch_size"]
        assert take(resumed, after) == expected
        assert resumed.examples_seen == loader.examples_seen


def test_a_state_after_more_passes_than_are_asked_for_is_at_the_end():
    with BatchLoader(Resumable(length=4), 4, epochs=5) as loader:
        for _ in range(4):
            next(loader)
        state = loader.get_state()
    with BatchLoader(Resumable(length=4), 4, epochs=2) as loader:
        loader.set_state(state)
        assert next(loader, None) is None


def test_the_example_that_could_not_be_read_is_read_when_resuming():
    class Counts:
        """Says that it is behind an example before it has read it."""

        def __init__(self, unreadable=-1):
            self.at, self.unreadable = 0, unreadable

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            if self.at == self.unreadable:
                raise OSError("the network is gone")
            return self.at

        def get_state(self):
            return self.at

        def set_state(self, state):
            self.at = state

    with BatchLoader(Counts(unreadable=5), 4) as loader:
        next(loader)
        with pytest.raises(OSError, match="the network is gone"):
            next(loader)
        state = loader.get_state()
    with BatchLoader(Counts(), 4) as loader:
        loader.set_state(state)
        assert next(loader).tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("source", [lambda: iter(range(99)), Passes], ids=["generator", "class"])
def test_what_cannot_be_resumed_says_so(source):
    with BatchLoader(source()) as loader:
        next(loader)
        with pytest.raises(TypeError, match=r"cannot be resumed: neither it nor its iterator has"):
            loader.get_state()


def test_an_iterator_that_cannot_be_told_where_to_go_is_not_sent_back():
    with BatchLoader(iter(range(99))) as loader:
        beginning = loader.get_state()
        loader.set_state(beginning)
        next(loader)
        with pytest.raises(TypeError, match=r"cannot be resumed: it has no set_state"):
            loader.set_state(beginning)
        assert next(loader)[0] == 16


def test_a_state_of_a_stream_that_became_shorter_says_so():
    with BatchLoader(Resumable(length=100), 50) as loader:
        next(loader)
        state = loader.get_state()
    state["skip"] += 60
    with BatchLoader(Resumable(length=100)) as loader:
        loader.set_state(state)
        with pytest.raises(ValueError, match=r"source ended .* examples before the one"):
            next(loader)


def test_a_state_of_another_kind_of_source_is_refused():
    arrays, stream = BatchLoader(np.arange(9)), BatchLoader(Resumable())
    with pytest.raises(ValueError, match="state lacks"):
        stream.set_state(arrays.get_state())
    with pytest.raises(ValueError, match="state lacks"):
        arrays.set_state(stream.get_state())
    with pytest.raises(ValueError, match="saved with processes=2, this loader has processes=1"):
        stream.set_state(stream.get_state() | {"processes": 2})


@pytest.mark.slow
def test_states_asked_for_by_another_thread_can_be_continued_from():
    states = []
    with BatchLoader(Resumable(10**6), 5) as loader:

        def save():
            while loader.examples_seen < 5000:
                states.append(loader.get_state())

        saver = threading.Thread(target=save)
        saver.start()
        while loader.examples_seen < 5000:
            next(loader)
        saver.join(30)
        for state in states[:: len(states) // 10]:
            loader.set_state(state)
            assert next(loader)[0] == state["position"]
