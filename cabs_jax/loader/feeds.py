"""Where batches come from: examples in the order of a seed, or a stream in its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Thread
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

from cabs_jax.loader.collation import Batch
from cabs_jax.loader.device_order import Position
from cabs_jax.loader.order import Order
from cabs_jax.loader.placement import Placement, sum_over_processes
from cabs_jax.loader.read_ahead import Block, ReadAhead
from cabs_jax.loader.sources import ArraySource, RecordSource
from cabs_jax.loader.streams import Place, Stream


class Cursor(NamedTuple):
    """Where a loader stands, replaced as a whole, so that other threads see one or the next.

    Attributes:
      position: In the examples of all processes together.
      own: In those of this process; of a stream, since it was made or resumed.
      earlier_sizes: Sizes that are still to take effect, oldest first, at most `lag` of them.
      place: The last known place of a stream that is not after `own`, and its own position.
    """

    position: int
    own: int
    earlier_sizes: tuple[int | jax.Array, ...] = ()
    place: tuple[int, Place] | None = None


class Share(NamedTuple):
    """This process's part of a batch.

    Attributes:
      total: Number of examples on all processes; 0 at the end.
      own: Number of examples on this one.
      room: Batch size that all processes make room for.
      collate: Gives the batch of them, padded to a number of rows; not for none.
      place: That of the cursor after them.
    """

    total: int
    own: int
    room: int
    collate: Callable[[int], Batch]
    place: tuple[int, Place] | None = None


class Feed(ABC):
    """Consecutive examples, from any cursor on.

    Attributes:
      counts: Names of the whole numbers in its states.
      reader: What reads ahead; None for arrays in memory.
      start: The cursor of its first example.
    """

    counts: tuple[str, ...] = ("position",)
    reader: ReadAhead | None = None
    start: Cursor = Cursor(0, 0)

    @abstractmethod
    def share(self, cursor: Cursor, size: int) -> Share:
        """This process's part of the next `size` examples."""

    @abstractmethod
    def position(self, cursor: Cursor) -> Position:
        """Epoch and offset of the next example."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a state must share with the loader that it is given to."""

    @abstractmethod
    def state(self, cursor: Cursor) -> dict[str, Any]:
        """What a state holds beside that and the position."""

    @abstractmethod
    def resumed(self, state: Mapping[str, Any], cursor: Cursor) -> tuple[Feed, Cursor]:
        """The feed and the cursor of a state that was checked, in place of a cursor."""

    @abstractmethod
    def fail(self) -> None:
        """Gets ready to go on after an error, or Ctrl-C, in a batch."""

    @abstractmethod
    def some_example(self) -> Batch:
        """A batch of one, for the shapes of one that holds none."""

    def release(self, cursor: Cursor) -> None:
        """Lets go of the examples before a cursor."""
        if self.reader is not None:
            self.reader.release(cursor.own)

    def stop(self) -> None:
        """Asks the background threads to end."""
        if self.reader is not None:
            self.reader.stop()


class OrderedFeed(Feed):
    """Arrays or records, each once per epoch, in the order of a seed.

    Args:
      source: Of the examples.
      seed: Identifies the order.
      shuffle: Whether to shuffle each epoch.
      placement: This process's share.
      epochs: Number of epochs, or None.
      num_threads: How many threads read ahead.
    """

    def __init__(
        self,
        source: ArraySource | RecordSource,
        seed: int,
        shuffle: bool,
        placement: Placement,
        epochs: int | None,
        num_threads: int,
    ):
        self._source = source
        self._identity = {"seed": seed, "length": source.length, "shuffle": shuffle}
        self._placement = placement
        self._end = None if epochs is None else epochs * source.length
        self._order = Order(source.length, seed, shuffle, placement.reader, placement.readers)
        if not source.in_memory:
            self.reader = ReadAhead(
                partial(_read_block, source, self._order),
                source.form,
                source.block_size,
                threads=num_threads,
                end=None if self._end is None else placement.own(self._end),
            )

    def share(self, cursor: Cursor, size: int) -> Share:
        """This process's part of the next `size` examples, fewer at the end."""
        left = size if self._end is None else self._end - cursor.position
        count = max(min(size, left), 0)
        start, stop = cursor.own, self._placement.own(cursor.position + count)
        if isinstance(self._source, ArraySource) and self._source.in_memory:
            collate = partial(self._source.read_rows, self._order(start, stop))
        else:
            assert self.reader is not None
            pieces, _ = self.reader.take(start, stop - start) if stop > start else ([], 0)
            collate = partial(self._source.form.collate, pieces)
        return Share(count, stop - start, count, collate)

    def position(self, cursor: Cursor) -> Position:
        """Epoch and offset of the next example of all processes."""
        return Position(*divmod(cursor.position, self._source.length))

    def identity(self) -> dict[str, Any]:
        """What decides on the order."""
        return self._identity

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """Nothing: the position is enough."""
        return {}

    def resumed(self, state: Mapping[str, Any], cursor: Cursor) -> tuple[Feed, Cursor]:
        """The same feed, read from another position on."""
        self.stop()
        position = int(state["position"])
        return self, Cursor(position, self._placement.own(position))

    def fail(self) -> None:
        """Stops reading; the examples are read anew."""
        self.stop()

    def some_example(self) -> Batch:
        """The first one, read while no thread reads."""
        one = self._source.read(self._order(0, 1), self._order.epochs(0, 1))
        return self._source.form.collate([one], 1)


class StreamFeed(Feed):
    """This process's stream, in the order that it gives.

    Args:
      stream: The stream.
      placement: This process's share of a batch.
      sharding: Of a batch.
      after: Threads that may still read the same source.
    """

    counts = ("position", "epoch", "offset", "skip")
    reader: ReadAhead

    def __init__(
        self,
        stream: Stream,
        placement: Placement,
        sharding: Sharding | None,
        after: Sequence[Thread] = (),
    ):
        self._stream = stream
        self._placement = placement
        self._sharding = sharding
        place = -stream.skip, stream.place
        self.start = Cursor(0, 0, place=place)
        self.reader = ReadAhead(
            stream.read, stream.form, stream.block_size, place=place, after=after
        )

    def share(self, cursor: Cursor, size: int) -> Share:
        """This process's part of the next `size` examples, fewer at the end of its stream.

        Where the stream ends, all processes must call it, and learn each other's numbers.
        """
        readers = self._placement.readers
        asked = self._placement.own(cursor.position + size) - self._placement.own(cursor.position)
        if readers == 1 or self._stream.epochs is None:
            pieces, own = self.reader.take(cursor.own, asked)
            total = own if readers == 1 else size
            return self._share(cursor, pieces, total, own, total)
        failed: Exception | None = None
        pieces, own = [], 0
        try:
            pieces, own = self.reader.take(cursor.own, asked)
        except Exception as error:  # the others must not wait for this process for ever
            failed = error
        assert self._sharding is not None
        shapeless = self._stream.once and not (cursor.own or own)
        mine = own, failed is not None, shapeless
        total, failures, without = sum_over_processes(
            mine, self._sharding, self._placement
        ).tolist()
        if failed is not None:
            raise failed
        if failures:
            raise RuntimeError("the stream of another process failed, and says there why.")
        if total and without:
            raise RuntimeError(
                "an iterator ended on one of the processes before its first example, so that the "
                "shape of its part of a batch is unknown: pass what gives a new iterator."
            )
        return self._share(cursor, pieces, total, own, size)

    def _share(self, cursor: Cursor, pieces: list[Any], total: int, own: int, room: int) -> Share:
        place = self.reader.place_at(cursor.own + own)
        return Share(total, own, room, partial(self._stream.form.collate, pieces), place)

    def position(self, cursor: Cursor) -> Position:
        """Epoch and offset of the next example of this process."""
        place, skip = self._place(cursor)
        return Position(place.epoch, place.offset + skip)

    def identity(self) -> dict[str, Any]:
        """Whose share the stream is."""
        return {"process": self._placement.reader, "processes": self._placement.readers}

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """Where the stream stood last, and how many examples it gave since."""
        if cursor.position and not self._stream.resumable:
            raise TypeError(
                f"{self._stream.name} cannot be resumed: neither it nor its iterator has get_state "
                "and set_state, or state_dict and load_state_dict."
            )
        place, skip = self._place(cursor)
        return {**place._asdict(), "skip": skip}

    def resumed(self, state: Mapping[str, Any], cursor: Cursor) -> tuple[Feed, Cursor]:
        """A new feed; the old one may still be at a record, and lets the new one wait."""
        position = int(state["position"])
        if self._stream.once and not self._stream.resumable and (position or cursor.position):
            raise TypeError(f"{self._stream.name} cannot be resumed: it has no set_state.")
        place = Place(int(state["epoch"]), int(state["offset"]), state.get("state"))
        stream = self._stream.at(place, int(state["skip"]))
        self.stop()
        feed = StreamFeed(stream, self._placement, self._sharding, self.reader.threads)
        return feed, feed.start._replace(position=position)

    def fail(self) -> None:
        """Nothing: the examples are still in stock."""

    def some_example(self) -> Batch:
        """The first of another pass, read once the last one ended."""
        return self._stream.first()

    def _place(self, cursor: Cursor) -> tuple[Place, int]:
        """The last known place, and the number of examples from there to the next."""
        assert cursor.place is not None
        position, place = cursor.place
        return place, cursor.own - position


def _read_block(source: ArraySource | RecordSource, order: Order, start: int, count: int) -> Block:
    stop = start + count
    return Block(source.read(order(start, stop), order.epochs(start, stop)), count)
