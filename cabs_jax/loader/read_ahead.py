"""Reading ahead: background threads read blocks of examples, the consumer cuts any size."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cabs_jax.loader.collation import MIN_BLOCK, Form

SECONDS_TO_CLOSE = 1.0  # after which a thread that a source holds up is left to end on its own


class Block(NamedTuple):
    """Consecutive examples, as they were read.

    Attributes:
      examples: What `Form` says.
      length: Their number.
      place: Where a stream stands after them, if it can tell.
      last: Whether no example follows.
    """

    examples: Any
    length: int
    place: Any = None
    last: bool = False


class ReadAhead:
    """Consecutive examples, read before they are asked for.

    Each thread takes the next block to read, so that blocks are read side by side and kept in
    order. Blocks are no larger than a fraction of the batches last asked for where examples may be
    slow, so that a smaller batch never waits for a large block. An error of the source is raised by
    `take`, once the examples read before it are used up.

    While a thread waits, it holds nothing but the stock of blocks: not this object, which ends it
    when it is collected, and not the source, which may hold the loader.

    Args:
      read: `read(start, count)` gives the block at a position; a stream ignores the position, and
        may give fewer or more.
      form: How examples are held in a block.
      block_size: Number of examples to read at a time, given that of a batch.
      threads: How many read at once.
      end: The position after the last one, if there is one.
      place: A position at or before 0 and where a stream stands there; None if examples can be
        read anew at any position, so that those in stock are let go when it stops.
      after: Threads that read the source before, and may still be at a record.
    """

    def __init__(
        self,
        read: Callable[[int, int], Block],
        form: Form,
        block_size: Callable[[int], int],
        *,
        threads: int = 1,
        end: int | None = None,
        place: tuple[int, Any] | None = None,
        after: Sequence[threading.Thread] = (),
    ):
        self.read = read
        self.threads = list(after)
        self._form = form
        self._block_size = block_size
        self._number = threads
        self._stock = _Stock(threads, end, place)
        weakref.finalize(self, self._stock.stop)

    def take(self, start: int, count: int) -> tuple[list[Any], int]:
        """Returns the `count` examples from `start` on as pieces of blocks, and their number.

        They are fewer at the end. They stay in stock until they are released, so that an
        interruption loses none.

        Raises:
          BaseException: Whatever the source raised, unless `count` examples came before it.
          RuntimeError: Another thread, or a signal's handler, stopped it meanwhile.
        """
        stock, block = self._stock, max(self._block_size(count) // self._number, 1)
        if stock.run is None:
            self._start(stock.start(start, count, block))
        with stock.condition:
            stop = stock.wait_for(start, count, block)
            return [
                self._form.cut(block.examples, max(start - first, 0), stop - first)
                for first, block in stock.blocks
                if first < stop and first + block.length > start
            ], stop - start

    def _start(self, run: object) -> None:
        # The source is never read by two generations of threads at once: the old ones end first.
        before = [thread for thread in self.threads if thread.is_alive()]
        self.threads = [
            threading.Thread(
                target=_fill,
                args=(weakref.ref(self), self._stock, run, before),
                name=f"cabs_jax read-ahead {number}",
                daemon=True,
            )
            for number in range(self._number)
        ]
        for thread in self.threads:
            thread.start()

    def release(self, position: int) -> None:
        """Makes room: the examples before a position are delivered."""
        self._stock.release(position)

    def place_at(self, position: int) -> tuple[int, Any]:
        """The last known place of a stream that is not after a position, with its own position."""
        return self._stock.place_at(position)

    def stop(self) -> None:
        """Asks the threads to end, without waiting."""
        self._stock.stop()

    def close(self) -> None:
        """Ends the threads, after the blocks that they are at if those come within a second."""
        self.stop()
        deadline = time.monotonic() + SECONDS_TO_CLOSE
        for thread in self.threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0))  # a source may close its loader


class _Slot:
    """A block that a thread reads, or has read."""

    def __init__(self, start: int, count: int):
        self.start = start
        self.count = count
        self.result: Block | BaseException | None = None


class _Stock:
    """Blocks that are read and not used up, between the threads and the consumer."""

    def __init__(
        self,
        threads: int,
        end: int | None,
        place: tuple[int, Any] | None,
    ):
        self.condition = threading.Condition()
        self.blocks: deque[tuple[int, Block]] = deque()  # without gaps, with their positions
        self.run: object | None = None  # of the threads that are to read
        self._slots: deque[_Slot] = deque()  # those that follow, read or not
        self._places = deque([place or (0, None)])
        self._is_stream = place is not None
        self._threads = threads
        self._end = end
        self._next = 0  # the position that no thread reads yet
        self._ready = 0  # the position after `blocks`
        self._released = 0
        self._request = self._block = 0  # sizes of the batch last asked for, and of its blocks
        self._error: BaseException | None = None
        self._process = os.getpid()

    def start(self, position: int, request: int, block: int) -> object:
        """Lets threads read from a position on; a stream goes on where it stopped."""
        with self.condition:
            self.run, self._error = object(), None
            self._request, self._block = request, block
            if not self._is_stream:
                self._next = self._ready = self._released = position
            return self.run

    def wait_for(self, start: int, count: int, block: int) -> int:
        """Waits for the examples and returns where they end, or raises what stands against them."""
        self.release(start)
        self._request, self._block = count, block
        self.condition.notify_all()

        def is_there() -> bool:
            return self._ready >= start + count or (
                self.run is None or self._error is not None or self._ready == self._end
            )

        self.condition.wait_for(is_there)
        if self._ready < start + count and self._ready != self._end:
            if self._error is not None:  # it may be false: exceptions can have a length
                raise self._error
            raise RuntimeError("the loader was closed while it read a batch.")
        return min(self._ready, start + count)

    def release(self, position: int) -> None:
        with self.condition:
            self._released = position
            while self.blocks and sum((self.blocks[0][0], self.blocks[0][1].length)) <= position:
                self.blocks.popleft()
            while len(self._places) > 1 and self._places[1][0] <= position:
                self._places.popleft()
            self.condition.notify_all()

    def place_at(self, position: int) -> tuple[int, Any]:
        with self.condition:
            return [known for known in self._places if known[0] <= position][-1]

    def wait_for_room(self, run: object) -> _Slot | None:
        """Returns what a thread of this run is to read next, or None to end."""
        with self.condition:
            self.condition.wait_for(lambda: self._is_over(run) or self._has_room())
            if self._is_over(run):
                return None
            count = self._block
            if self._end is not None:
                count = min(count, self._end - self._next)
            slot = _Slot(self._next, count)
            self._next += count
            self._slots.append(slot)
            return slot

    def _is_over(self, run: object) -> bool:
        return self.run is not run or self._error is not None or self._next == self._end

    def _has_room(self) -> bool:
        ahead = 2 * max(self._request, MIN_BLOCK) + (self._threads - 1) * self._block
        return self._next < self._released + ahead

    def put(self, slot: _Slot, result: Block | BaseException) -> None:
        with self.condition:
            slot.result = result
            while self._error is None and self._slots and self._slots[0].result is not None:
                self._append(self._slots.popleft())
            self.condition.notify_all()

    def _append(self, slot: _Slot) -> None:
        block = slot.result
        if not isinstance(block, Block):
            self._error, self._next = block, slot.start
            return
        if block.length:
            self.blocks.append((slot.start, block))
        self._ready = slot.start + block.length
        self._next += block.length - slot.count  # of a stream, the only slot
        if block.place is not None:
            self._places.append((self._ready, block.place))
        if block.last:
            self._end = self._ready

    def stop(self) -> None:
        """Ends the threads and every wait; safe in a finalizer."""
        if os.getpid() != self._process:  # a fork's copy, without the thread: the lock may be held
            self.run = None
            return
        with self.condition:
            self.run = None
            if not self._is_stream:
                self.blocks.clear()
                self._slots.clear()
            self.condition.notify_all()


def _fill(
    reader_reference: weakref.ref[ReadAhead],
    stock: _Stock,
    run: object,
    before: list[threading.Thread],
) -> None:
    """Reads blocks into the stock until it is stopped: what a thread does."""
    for thread in before:
        thread.join()
    while (slot := stock.wait_for_room(run)) is not None:
        reader = reader_reference()
        if reader is None:
            return
        try:
            block = reader.read(slot.start, slot.count)
        except BaseException as error:  # raised again by the consumer, in `take`
            stock.put(slot, error)
            return
        stock.put(slot, block)
        del reader, block, slot  # while it waits, it holds none of them
