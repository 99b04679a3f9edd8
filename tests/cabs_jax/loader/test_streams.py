"""Any iterable, re-cut into batches of any size: nothing lost, nothing shuffled."""

import contextlib
import itertools
import json
import signal
import threading

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import BatchLoader, Position


class Passes:
    """An iterable that begins anew each time, with a log of its epochs and a hook."""

    def __init__(self, length=100, hook=lambda index: None):
        self.length = length
        self.hook = hook
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for index in range(self.length):
            self.hook(index)
            yield {"x": np.int32(index)}


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


def grain_stream(length=100, size=None):
    stream = grain.MapDataset.range(length).seed(1).shuffle().to_iter_dataset()
    return stream.batch(size) if size else stream


def batches_of(size, length=100):
    return [np.arange(length)[start : start + size] for start in range(0, length, size)]


@pytest.mark.parametrize("batched", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 60),
    size=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=10),
    epochs=st.integers(1, 3),
)
def test_each_example_comes_once_an_epoch_in_the_order_of_the_stream(
    batched, length, size, sizes, epochs
):
    source = batches_of(size, length) if batched else map(int, np.arange(length))
    epochs = epochs if batched else 1
    got = []
    with BatchLoader(source, batched=batched, epochs=epochs) as loader:
        for loader.batch_size in itertools.cycle(sizes):
            batch = next(loader, None)
            if batch is None:
                break
            left = length * epochs - sum(map(len, got))
            assert len(batch) == min(loader.batch_size, left)
            got.append(batch)
        assert loader.examples_seen == length * epochs
        assert next(loader, None) is None
    np.testing.assert_array_equal(np.concatenate(got), np.tile(np.arange(length), epochs))


def test_an_iterable_is_passed_over_again_and_told_the_epoch():
    source = Passes(5)
    with BatchLoader(source, 4) as loader:
        got = [next(loader)["x"].tolist() for _ in range(4)]
    assert got == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1], [2, 3, 4, 0]]
    assert source.epochs == list(range(len(source.epochs)))


def test_a_data_loader_of_pairs():
    class DataLoader:  # as torch's: a length, no items, batches that are lists of tensors
        class Sampler:
            set_epoch = staticmethod(lambda epoch: epochs.append(epoch))

        sampler = Sampler()

        def __len__(self):
            return 3

        def __iter__(self):
            for size in (4, 4, 2):
                yield [np.ones((size, 2), np.float32), np.arange(size)]

    epochs = []
    with BatchLoader(DataLoader(), 7, batched=True, epochs=2) as loader:
        shapes = [[leaf.shape for leaf in batch] for batch in loader]
    assert shapes == [[(7, 2), (7,)], [(7, 2), (7,)], [(6, 2), (6,)]]
    assert epochs == [0, 1]


def test_columns_that_are_lists():
    stream = [{"x": [[0, 1], [2, 3]], "label": [0, 1]}, {"x": [[4, 5]], "label": [2]}]
    with BatchLoader(stream, 3, batched=True) as loader:
        batch = next(loader)
    np.testing.assert_equal(batch, {"x": np.array([[0, 1], [2, 3], [4, 5]]), "label": np.arange(3)})


def test_grain_and_padding():
    with BatchLoader(grain_stream(10), 8, pad_to=(8, 16), epochs=1) as loader:
        (first, all_real), (second, mask) = loader
    assert sorted([*first, *second[mask]]) == list(range(10))
    assert all_real.all()
    assert mask.tolist() == [True] * 2 + [False] * 6


def test_a_buffer_that_is_written_again_and_again():
    def reuse():
        buffer = np.zeros(3, np.int32)
        for index in range(40):
            buffer[:] = index
            yield buffer

    for batched in (False, True):
        with BatchLoader(reuse(), 40 if not batched else 120, batched=batched) as loader:
            batch = next(loader)
        assert np.unique(batch).tolist() == list(range(40))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchLoader(Passes(), shuffle=True), "cannot be shuffled here"),
        (lambda: BatchLoader(Passes(), num_threads=2), "read by one thread, got num_threads=2"),
        (lambda: BatchLoader(iter([1]), epochs=2), "list_iterator is an iterator.*epochs=2"),
        (lambda: BatchLoader(np.arange(3), batched=True), "source holds arrays"),
        (lambda: BatchLoader(Passes(), epochs=0), "epochs must be at least 1, got 0"),
        (lambda: next(BatchLoader(Passes(0))), "pass 0 over it gave none"),
        (lambda: next(BatchLoader([np.int32(1)], batched=True)), "got lengths"),
        (
            lambda: next(
                BatchLoader([np.zeros(2, np.int32), np.zeros(2, np.int8)], 4, batched=True)
            ),
            "batches differ in dtype",
        ),
        (lambda: next(BatchLoader(iter([1, {"x": 1}]), 2)), "records differ in structure"),
    ],
)
def test_what_cannot_be_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_masked_array_in_a_stream_is_refused():
    with pytest.raises(TypeError, match="mask would be lost"):
        next(BatchLoader(iter([np.ma.array([1, 2], mask=[0, 1])])))


def test_what_gives_only_one_pass_without_being_an_iterator():
    class Once:
        numbers = iter(range(5))

        def __iter__(self):
            return self.numbers

    with BatchLoader(Once(), 3) as loader:
        next(loader)
        with pytest.raises(ValueError, match=r"pass 1 over it gave none.*epochs=1"):
            next(loader)


def test_an_error_comes_in_its_place_and_is_not_taken_for_the_end():
    def broken():
        yield from range(10)
        raise OSError("bad sector")

    with BatchLoader(broken(), 4) as loader:
        assert next(loader).tolist() == [0, 1, 2, 3]
        assert next(loader).tolist() == [4, 5, 6, 7]
        for _ in range(2):
            with pytest.raises(OSError, match="bad sector"):
                next(loader)
            loader.close()
        loader.batch_size = 2
        assert next(loader).tolist() == [8, 9]


def test_reading_ahead_is_bounded_by_the_size_asked_for():
    read = []
    with BatchLoader(Passes(10**6, read.append), 1024) as loader:
        next(loader)
        loader.batch_size = 16
        for _ in range(200):
            next(loader)
            assert len(read) <= loader.examples_seen + 3 * 1024
        assert len(read) <= loader.examples_seen + 3 * 128


def test_closing_loses_no_example_of_a_generator():
    loader = BatchLoader((index for index in range(10_000)), 7)
    for number in range(30):
        assert next(loader).tolist() == list(range(7 * number, 7 * number + 7))
        loader.close()


@pytest.fixture
def interruptible():
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_loses_no_example_of_a_generator():
    gate = threading.Event()
    source = Passes(hook=lambda index: gate.wait() if index == 40 else None)
    with BatchLoader(iter(source), 16) as loader:
        next(loader)
        next(loader)
        main = threading.main_thread().ident
        threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        gate.set()
        np.testing.assert_array_equal(next(loader)["x"], np.arange(32, 48))


STREAMS = {
    "methods of the iterable": lambda: Resumable(),
    "batches": lambda: Resumable(size=7),
    "methods of the iterator": lambda: grain_stream(),
    "batches of Grain": lambda: grain_stream(size=7),
    "an iterator": lambda: iter(grain_stream()),
}


OF_GRAIN = ("methods of the iterator", "batches of Grain", "an iterator")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in OF_GRAIN)) for kind in STREAMS],
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


@pytest.mark.parametrize("source", [lambda: Passes(10), lambda: np.arange(10)])
def test_where_a_loader_stands(source):
    with BatchLoader(source(), 4, shuffle=False) as loader:
        for _ in range(4):
            next(loader)
        assert (loader.epoch, loader.position) == (1, Position(1, 6))
        assert loader.examples_seen == 16


def test_a_sharded_stream_that_ends_needs_padding():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    with pytest.raises(ValueError, match=r"may not split over 8 shards: pass pad_to"):
        BatchLoader(iter(range(20)), sharding=sharding)
    for length, splits in ((12, True), (10, False)):
        with contextlib.nullcontext() if splits else pytest.raises(ValueError, match="8 shards"):
            BatchLoader(np.arange(length), 8, sharding=sharding, epochs=2)
    with BatchLoader(iter(range(20)), 16, sharding=sharding, pad_to=16) as loader:
        batches = [(batch, mask) for batch, mask in loader]
    assert [int(mask.sum()) for _, mask in batches] == [16, 4]
    assert all(batch.sharding == sharding for batch, _ in batches)


@pytest.mark.parametrize("records", [False, True])
def test_arrays_and_records_end_after_their_epochs(records):
    source = list(range(10)) if records else np.arange(10)
    with BatchLoader(source, 8, epochs=2) as loader:
        batches = list(loader)
        assert list(map(len, batches)) == [8, 8, 4]
        assert sorted(np.concatenate(batches)) == sorted([*range(10)] * 2)
        assert loader.position == Position(2, 0)
        assert list(loader) == []


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
