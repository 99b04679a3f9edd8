"""`BatchLoader`: consecutive slices of the endless stream of examples."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Self, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cabs_jax._arguments import check_non_negative
from cabs_jax._closing import Closing
from cabs_jax.loader.order import Order
from cabs_jax.loader.padding import PadTo, padding_rule
from cabs_jax.loader.placement import place, placement
from cabs_jax.loader.read_ahead import ReadAhead
from cabs_jax.loader.sources import ArraySource, Batch, as_source

MAX_BATCH_SIZE = 2**24  # larger ones are accidents, and would exhaust memory before any error
POSITIONS = 2**63  # in the stream; no state holds a larger one

_copy = jax.jit(jnp.copy)  # 7 microseconds; dispatched alone, the copy costs 44


class _Cursor(NamedTuple):
    """Where a loader stands, replaced as a whole, so that other threads see one or the next.

    Attributes:
      position: In the stream of all processes together.
      earlier_sizes: Sizes that are still to take effect, oldest first, at most `lag` of them.
    """

    position: int
    earlier_sizes: tuple[int | jax.Array, ...]


class BatchLoader(Closing):
    """Endless batches whose size may change at every step.

    The examples form one endless stream of epochs, each in its own shuffled order. Batches are
    consecutive slices of the stream and may span epochs, so nothing is dropped: whatever the
    sizes, each example appears exactly once per epoch. The order is a function of seed and
    position that is never stored, so a source of any length costs the same memory.

    Arrays in memory are gathered when a batch is cut, which is the only copy. Records and
    memory-mapped arrays are read ahead by a background thread, which starts with the first batch
    and ends with `close`, at the end of a `with` block, with an error, or with the loader itself.

    Threads may share a loader: each batch goes to one of them. Processes may not: a loader is
    neither copied nor pickled, and in a forked process it raises; make one in each, and continue
    with `set_state`.

    Args:
      source: Examples to load, at least one. A pytree (dict, tuple, single array) is a source of
        arrays of shape (length, ...). A list, or an object with `__len__` and `__getitem__`, is
        a source of records, read with `__getitems__` where it has one; records are pytrees
        of values, stacked leaf by leaf.
      batch_size: Size of the first batches; see the attribute.
      seed: Non-negative integer that identifies the order.
      shuffle: False gives the source's own order in every epoch.
      sharding: Yields global arrays sharded so, such as `NamedSharding(mesh, P("data"))`. Each
        process reads only its own share of the stream, one example in as many as there are
        shares, whatever the sizes: the batch holds the same examples as on one process, in
        another order. Sizes must be multiples of the number of shards, unless padded, and at
        least the number of processes. The transfer to the devices is not waited for.
      pad_to: Yields `(batch, mask)`, padded with zeros, or empty text, to one size, to the next
        larger of several (see `buckets`), or to `pad_to(size)`; `mask`, of shape (rows,), is True
        for examples.
      lag: Every size takes effect `lag` batches late. With 1, batch k + 1 is cut with the size
        that step k - 1 gave, so that cutting and transferring it overlap step k.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If `source` is empty, if its arrays differ in length, if `seed` or `lag` is
        negative, if `batch_size` is not positive, if `pad_to` is not increasing multiples of
        the number of shards, or if `sharding` splits another axis than the leading one.

    Example:
      >>> import numpy as np
      >>> loader = BatchLoader({"x": np.arange(5)}, batch_size=2, shuffle=False)
      >>> next(loader)
      {'x': array([0, 1])}
      >>> loader.batch_size = 4
      >>> next(loader)
      {'x': array([2, 3, 4, 0])}
    """

    def __init__(
        self,
        source: Any,
        batch_size: SupportsIndex | jax.Array = 16,
        seed: int = 0,
        *,
        shuffle: bool = True,
        sharding: Sharding | None = None,
        pad_to: PadTo | None = None,
        lag: int = 0,
    ):
        self._seed = check_non_negative("seed", seed)
        self._lag = check_non_negative("lag", lag)
        self._shuffle = bool(shuffle)
        self._source = as_source(source)
        self._sharding = sharding
        self._placement = placement(sharding)
        self._rows = padding_rule(pad_to, self._placement.shards)
        self._masked = pad_to is not None
        self._order = Order(
            self._source.length,
            self._seed,
            self._shuffle,
            offset=self._placement.reader,
            stride=self._placement.readers,
        )
        self._cursor = _Cursor(0, ())
        self._reader: ReadAhead | None = None
        self._process = os.getpid()
        self._lock = threading.RLock()  # held while a batch is cut
        self._busy = False
        self._last_read: tuple[Any, int] = (None, 0)  # a size as it was set, and as it was read
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int | jax.Array:
        """Number of examples in the next batch, settable to an integer or an integer scalar array.

        A `jax.Array` is only read when the batch is cut, so that setting it does not wait for the
        device; if its value is then not a positive size, the cut raises a ValueError.
        """
        size, (read_from, value) = self._batch_size, self._last_read
        return value if read_from is size else size

    @batch_size.setter
    def batch_size(self, value: SupportsIndex | jax.Array) -> None:
        if isinstance(value, jax.Array):
            if isinstance(value, jax.core.Tracer):
                raise TypeError("batch_size must be set outside of jit, got a tracer.")
            if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
                raise TypeError(
                    f"batch_size must be an integer scalar, got {value.dtype}{list(value.shape)}."
                )
            # A late reader needs its own copy: the next step may be given, and reuse, the original.
            size = _copy(value) if self._lag else value
            size.copy_to_host_async()
            self._batch_size: int | jax.Array = size
        else:
            self._batch_size = _checked_size(value)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The next `batch_size` examples.

        Returns:
          A pytree of numpy arrays of shape (batch_size, ...), or of global `jax.Array`s with
          `sharding`. With `pad_to`, a pair of that and the mask.
        """
        with self._alone("next"):
            cursor = self._cursor
            sizes = (*cursor.earlier_sizes, self._batch_size)
            try:
                size, rows = self._size_and_rows(sizes[0])
            except Exception:  # were it kept, it would stand in the way of those set after it
                self._cursor = cursor._replace(earlier_sizes=cursor.earlier_sizes[1:])
                raise
            try:
                batch = self._load(cursor.position, size, rows)
                pending = sizes[1:] if len(sizes) > self._lag else sizes
                self._cursor = _Cursor(cursor.position + size, pending)
            except BaseException as error:  # Ctrl-C too
                self._stop()  # it may have given examples away: read them anew
                if isinstance(error, StopIteration):
                    raise RuntimeError("source raised StopIteration.") from error
                raise
            return batch

    def get_state(self) -> dict[str, Any]:
        """What identifies the next example, for JSON; the batch size lives in the optimizer state.

        It is the same for all processes, whatever their number, and depends on neither past batch
        sizes nor reading ahead. With `lag`, it includes the sizes that are still to take effect,
        without those that the next batches would refuse.

        Example:
          >>> loader = BatchLoader([3, 1, 4, 1, 5], batch_size=3, seed=7)
          >>> _ = next(loader)
          >>> loader.get_state()
          {'seed': 7, 'length': 5, 'shuffle': True, 'position': 3}
        """
        cursor = self._cursor
        state = {**self._stream(), "position": cursor.position}
        if self._lag:
            sizes = [int(size) for size in cursor.earlier_sizes]
            state["batch_sizes"] = [size for size in sizes if 1 <= size <= MAX_BATCH_SIZE]
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with the example after the last one that was loaded at `get_state`.

        Raises:
          TypeError: If it is no mapping, or holds something else than numbers where they belong.
          ValueError: If it is incomplete, belongs to another stream of examples, or holds a
            position or a size that no loader can have. The loader then stays as it was.
        """
        cursor = self._saved_cursor(state)
        self.close()  # which ends a wait in another thread
        with self._alone("set_state"):
            self._stop()
            self._cursor = cursor

    def close(self) -> None:
        """Ends the background thread, if there is one; the next batch would start it again.

        It waits for the records that the thread is reading, but at most a second: a thread that its
        source holds up longer ends with the call that it is in.
        """
        reader = self._reader
        if reader is not None and os.getpid() == self._process:
            reader.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BatchLoader cannot be copied or pickled: make another from the same source and "
            "seed, and continue with other.set_state(loader.get_state())."
        )

    def _stream(self) -> dict[str, Any]:
        return {"seed": self._seed, "length": self._source.length, "shuffle": self._shuffle}

    def _saved_cursor(self, state: Mapping[str, Any]) -> _Cursor:
        """What `set_state` is told, checked."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict that get_state returned, got {state!r}.")
        stream = self._stream()
        if missing := {*stream, "position"} - state.keys():
            raise ValueError(f"state lacks {sorted(missing)}, got {dict(state)}.")
        for key, own in stream.items():
            saved = state[key]
            if isinstance(saved, list | tuple) or np.ndim(saved) or saved != own:
                raise ValueError(
                    f"state was saved with {key}={saved}, this loader has {key}={own}: "
                    "the order of examples would differ."
                )
        position = check_non_negative("position", state["position"])
        if position >= POSITIONS:
            raise ValueError(f"position must be below 2**63, got {position}.")
        sizes = state.get("batch_sizes", ())
        if not isinstance(sizes, list | tuple | np.ndarray) or np.ndim(sizes) != 1:
            raise TypeError(f"batch_sizes must be a list of batch sizes, got {sizes!r}.")
        checked = tuple(map(_checked_size, sizes))
        return _Cursor(position, checked[-self._lag :] if self._lag else ())

    @contextmanager
    def _alone(self, caller: str) -> Iterator[None]:
        """Keeps other threads waiting, and refuses what could only go wrong."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{caller} on a loader that process {self._process} made, in its fork "
                f"{os.getpid()}: make a loader in each process, and continue with set_state."
            )
        if self._reader is not None and self._reader.thread is threading.current_thread():
            raise RuntimeError(f"{caller} was called by the loader's own source.")
        with self._lock:
            if self._busy:  # with this very thread: the lock keeps out all others
                raise RuntimeError(f"{caller} was called while this thread is cutting a batch.")
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.stop()

    def _size_and_rows(self, value: int | jax.Array) -> tuple[int, int]:
        """The number of examples of the next batch, and of its rows on all processes."""
        read_from, size = self._last_read
        if read_from is not value:
            size = _checked_size(value)
            self._last_read = value, size  # the array may be donated from now on
        readers = self._placement.readers
        rows = self._rows(size)
        if rows > MAX_BATCH_SIZE:
            raise ValueError(f"pad_to must give at most {MAX_BATCH_SIZE} rows, got {rows}.")
        if size < readers:
            raise ValueError(
                f"batch size {size} leaves some of {readers} processes without any example: give "
                f"the optimizer min_batch_size={readers} or more."
            )
        return size, rows

    def _load(self, position: int, size: int, rows: int) -> Any:
        """The `size` next examples of all processes together."""
        reader, readers = self._placement.reader, self._placement.readers
        own_rows = rows // readers
        start, stop = ((p - reader + readers - 1) // readers for p in (position, position + size))
        batch = self._cut(start, stop - start, own_rows)
        if self._masked:
            batch = batch, np.arange(own_rows) < stop - start
        return batch if self._sharding is None else place(batch, self._sharding)

    def _cut(self, start: int, count: int, rows: int) -> Batch:
        """This process's examples from its position `start` on, padded to `rows`."""
        if isinstance(self._source, ArraySource) and self._source.in_memory:
            return self._source.read(self._order(start, start + count), rows)
        reader = self._reader  # which another thread may stop at any time
        if reader is None or reader.stopped:
            before = None if reader is None or not reader.thread.is_alive() else reader.thread
            reader = self._reader = ReadAhead(self._source, self._order, start, count, before)
            reader.start()
        return self._source.collate(reader.take(count), rows)


def _checked_size(value: SupportsIndex | jax.Array) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"batch_size must be an integer, got {value!r}.") from error
    if isinstance(value, bool) or not 1 <= size <= MAX_BATCH_SIZE:
        raise ValueError(f"batch_size must be in [1, {MAX_BATCH_SIZE}], got {value!r}.")
    return size
