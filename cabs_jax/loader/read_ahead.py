"""Reading ahead: one background thread reads blocks of examples, the consumer cuts any size."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from cabs_jax.loader.order import Order
from cabs_jax.loader.sources import ArraySource, RecordSource

MIN_BLOCK = 16


class ReadAhead:
    """Consecutive examples of a stream, read before they are asked for.

    The thread holds neither the consumer nor its loader, so that either can be collected. It reads
    blocks of the size last asked for: batches of a constant size are whole blocks, and the block
    after next is complete before it is needed. A source error ends the thread and is raised
    by `take`, once the examples read before it are used up.

    Args:
      source: Where examples are read.
      order: Which examples, by position.
      start: The first position.
      count: How many examples the first `take` will ask for.
    """

    def __init__(self, source: ArraySource | RecordSource, order: Order, start: int, count: int):
        self._source = source
        self._order = order
        self._next = start
        self._blocks: deque[tuple[Any, int]] = deque()  # blocks and their lengths
        self._used = 0  # examples of the first block that are cut already
        self._available = 0
        self._request = count
        self._error: BaseException | None = None
        self._stopped = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cabs_jax read-ahead", daemon=True)
        self._thread.start()

    def take(self, count: int) -> list[Any]:
        """The next `count` examples, as pieces of blocks.

        Raises:
          BaseException: Whatever the source raised, unless `count` examples came before it.
          RuntimeError: Another thread, or a signal's handler, stopped it meanwhile.
        """
        with self._condition:
            self._request = count
            self._condition.notify_all()
            self._condition.wait_for(
                lambda: self._available >= count or self._error is not None or self._stopped
            )
            if self._available < count:
                raise self._error or RuntimeError("the loader was closed while it read a batch")
            self._available -= count
            self._condition.notify_all()
            return self._cut(count)

    def stop(self) -> None:
        """Asks the thread to end, without waiting: safe in a finalizer."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def close(self) -> None:
        """Ends the thread, after the block that it is reading."""
        self.stop()
        self._thread.join()

    def _cut(self, count: int) -> list[Any]:
        pieces = []
        while count:
            block, length = self._blocks[0]
            stop = min(length, self._used + count)
            pieces.append(self._source.cut(block, self._used, stop))
            count -= stop - self._used
            self._used = stop
            if stop == length:
                self._blocks.popleft()
                self._used = 0
        return pieces

    def _run(self) -> None:
        while (count := self._wait_for_room()) is not None:
            try:
                block = self._source.read(self._order(self._next, self._next + count))
            except BaseException as error:  # raised again by the consumer, in `take`
                with self._condition:
                    self._error = error
                    self._condition.notify_all()
                return
            with self._condition:
                self._blocks.append((block, count))
                self._available += count
                self._next += count
                self._condition.notify_all()

    def _wait_for_room(self) -> int | None:
        """The size of the block to read next, or None to end."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._stopped or self._available < 2 * max(self._request, MIN_BLOCK)
            )
            return None if self._stopped else max(self._request, MIN_BLOCK)
