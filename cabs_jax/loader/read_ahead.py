"""Reading ahead: one background thread reads blocks of examples, the consumer cuts any size."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import Any

from cabs_jax.loader.order import Order
from cabs_jax.loader.sources import ArraySource, RecordSource

MIN_BLOCK = 16
SECONDS_TO_CLOSE = 1.0  # after which a thread that a source holds up is left to end on its own


class ReadAhead:
    """Consecutive examples of a stream, read before they are asked for.

    The thread reads blocks of the size last asked for: batches of a constant size are whole blocks,
    and the block after next is complete before it is needed. A source error ends the thread and is
    raised by `take`, once the examples read before it are used up.

    While the thread waits, it holds nothing but the stock of blocks: not this object, which ends it
    when it is collected, and not the source, which may hold the loader.

    Args:
      source: Where examples are read.
      order: Which examples, by position.
      start: The first position.
      count: How many examples the first `take` will ask for.
      after: The thread that read the source before, which may still be at a record: a source is
        never read by two threads at once.
    """

    def __init__(
        self,
        source: ArraySource | RecordSource,
        order: Order,
        start: int,
        count: int,
        after: threading.Thread | None = None,
    ):
        self._source = source
        self._order = order
        self._next = start  # touched by the thread alone
        self._used = 0  # examples of the first block that are cut already
        self._stock = _Stock(count)
        weakref.finalize(self, self._stock.stop)
        self.thread = threading.Thread(
            target=_fill,
            args=(weakref.ref(self), self._stock, after),
            name="cabs_jax read-ahead",
            daemon=True,
        )

    def start(self) -> None:
        """Begins to read; not done at construction, so that its owner can already stop it."""
        self.thread.start()

    @property
    def stopped(self) -> bool:
        """Whether it gives no more examples."""
        return self._stock.stopped

    def take(self, count: int) -> list[Any]:
        """Returns the next `count` examples, as pieces of blocks.

        Raises:
          BaseException: Whatever the source raised, unless `count` examples came before it.
          RuntimeError: Another thread, or a signal's handler, stopped it meanwhile.
        """
        with self._stock.condition:
            self._stock.wait_for(count)
            self._stock.available -= count
            self._stock.condition.notify_all()
            return self._cut(count)

    def stop(self) -> None:
        """Asks the thread to end, without waiting."""
        self._stock.stop()

    def close(self) -> None:
        """Ends the thread, after the block that it is reading if that comes within a second."""
        self.stop()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(SECONDS_TO_CLOSE)  # a source may close its own loader

    def read_block(self, count: int) -> Any:
        """Reads the next `count` examples; the thread calls it."""
        block = self._source.read(self._order(self._next, self._next + count))
        self._next += count
        return block

    def _cut(self, count: int) -> list[Any]:
        pieces, blocks = [], self._stock.blocks
        while count:
            block, length = blocks[0]
            stop = min(length, self._used + count)
            pieces.append(self._source.cut(block, self._used, stop))
            count -= stop - self._used
            self._used = stop
            if stop == length:
                blocks.popleft()
                self._used = 0
        return pieces


class _Stock:
    """Blocks that are read and not used up, between the thread and the consumer."""

    def __init__(self, request: int):
        self.condition = threading.Condition()
        self.blocks: deque[tuple[Any, int]] = deque()  # blocks and their lengths
        self.available = 0
        self.stopped = False
        self._request = request
        self._error: BaseException | None = None
        self._process = os.getpid()

    def wait_for(self, count: int) -> None:
        """Waits for `count` examples, or raises what stands against them."""
        self._request = count
        self.condition.notify_all()
        self.condition.wait_for(
            lambda: self.available >= count or self._error is not None or self.stopped
        )
        if self.available < count:
            if self._error is not None:  # it may be false: exceptions can have a length
                raise self._error
            raise RuntimeError("the loader was closed while it read a batch.")

    def wait_for_room(self) -> int | None:
        """Returns the size of the block to read next, or None to end."""
        with self.condition:
            self.condition.wait_for(
                lambda: self.stopped or self.available < 2 * max(self._request, MIN_BLOCK)
            )
            return None if self.stopped else max(self._request, MIN_BLOCK)

    def put(self, block: Any, count: int) -> None:
        with self.condition:
            if not self.stopped:
                self.blocks.append((block, count))
                self.available += count
                self.condition.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.condition:
            self._error = error
            self.condition.notify_all()

    def stop(self) -> None:
        """Ends the thread and every wait; safe in a finalizer."""
        if os.getpid() != self._process:  # a fork's copy, without the thread: the lock may be held
            self.stopped = True
            return
        with self.condition:
            self.stopped = True
            self.blocks.clear()
            self.available = 0
            self.condition.notify_all()


def _fill(
    reader_reference: weakref.ref[ReadAhead], stock: _Stock, after: threading.Thread | None
) -> None:
    """Reads blocks into the stock until it is stopped: what the thread does."""
    if after is not None:
        after.join()
    del after
    while (count := stock.wait_for_room()) is not None:
        reader = reader_reference()
        if reader is None:
            return
        try:
            block = reader.read_block(count)
        except BaseException as error:  # raised again by the consumer, in `take`
            stock.fail(error)
            return
        stock.put(block, count)
        del reader, block  # while it waits, it holds neither
