"""`BatchLoader`: consecutive slices of the endless stream of examples."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from typing import Any, Self, SupportsIndex

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

_copy = jax.jit(jnp.copy)  # 7 microseconds; dispatched alone, the copy costs 44


class BatchLoader(Closing):
    """Endless batches whose size may change at every step.

    The examples form one endless stream of epochs, each in its own shuffled order. Batches are
    consecutive slices of the stream and may span epochs, so nothing is dropped: whatever the
    sizes, each example appears exactly once per epoch. The order is a function of seed and
    position that is never stored, so a source of any length costs the same memory.

    Arrays in memory are gathered when a batch is cut, which is the only copy. Records and
    memory-mapped arrays are read ahead by a background thread, which starts with the first batch
    and ends with `close`, at the end of a `with` block, with an error, or with the loader itself.

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
      pad_to: Yields `(batch, mask)`, padded with zeros to one size, to the next larger of several
        (see `buckets`), or to `pad_to(size)`; `mask`, of shape (rows,), is True for examples.
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
        self._position = 0  # in the global stream
        self._earlier_sizes: tuple[int | jax.Array, ...] = ()  # oldest first, at most `lag`
        self._reader: ReadAhead | None = None
        self._stop_reader = weakref.finalize(self, lambda: None)
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int | jax.Array:
        """Number of examples in the next batch, settable to an integer or an integer scalar array.

        A `jax.Array` is only read when the batch is cut, so that setting it does not wait for the
        device; if its value is then not a positive size, the cut raises a ValueError.
        """
        return self._batch_size

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
            self._batch_size: int | jax.Array = _copy(value) if self._lag else value
            self._batch_size.copy_to_host_async()
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
        sizes = (*self._earlier_sizes, self._batch_size)
        size = _checked_size(sizes[0])
        try:
            batch = self._load(size)
            self._position += size
        except BaseException as error:  # Ctrl-C too
            self._stop_reader()  # it may have given examples away: read them anew
            if isinstance(error, StopIteration):
                raise RuntimeError("source raised StopIteration.") from error
            raise
        self._earlier_sizes = sizes[1:] if len(sizes) > self._lag else sizes
        if not self._lag:
            self._batch_size = size  # the array it was read from may be donated from now on
        return batch

    def get_state(self) -> dict[str, Any]:
        """What identifies the next example, for JSON; the batch size lives in the optimizer state.

        It is the same for all processes, whatever their number, and depends on neither past batch
        sizes nor reading ahead. With `lag`, it includes the sizes that are still to take effect.

        Example:
          >>> loader = BatchLoader([3, 1, 4, 1, 5], batch_size=3, seed=7)
          >>> _ = next(loader)
          >>> loader.get_state()
          {'seed': 7, 'length': 5, 'shuffle': True, 'position': 3}
        """
        state = {**self._stream(), "position": self._position}
        if self._lag:
            state["batch_sizes"] = [int(size) for size in self._earlier_sizes]
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with the example after the last one that was loaded at `get_state`.

        Raises:
          ValueError: If the state is incomplete, or belongs to another stream of examples.
        """
        stream = self._stream()
        if missing := {*stream, "position"} - state.keys():
            raise ValueError(f"state lacks {sorted(missing)}, got {dict(state)}.")
        for key, own in stream.items():
            if state[key] != own:
                raise ValueError(
                    f"state was saved with {key}={state[key]}, this loader has {key}={own}: "
                    "the order of examples would differ."
                )
        position = check_non_negative("position", state["position"])
        sizes = tuple(_checked_size(size) for size in state.get("batch_sizes", ()))
        self.close()
        self._position = position
        self._earlier_sizes = sizes[-self._lag :] if self._lag else ()

    def close(self) -> None:
        """Ends the background thread, if there is one; the next batch would start it again."""
        self._stop_reader()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _stream(self) -> dict[str, Any]:
        return {"seed": self._seed, "length": self._source.length, "shuffle": self._shuffle}

    def _load(self, size: int) -> Any:
        """The `size` next examples of all processes together."""
        readers = self._placement.readers
        rows = self._rows(size) // readers
        if size < readers:
            raise ValueError(
                f"batch size {size} leaves some of {readers} processes without any example: give "
                f"the optimizer min_batch_size={readers} or more."
            )
        start, stop = (
            (position - self._placement.reader + readers - 1) // readers
            for position in (self._position, self._position + size)
        )
        batch = self._cut(start, stop - start, rows)
        if self._masked:
            batch = batch, np.arange(rows) < stop - start
        return batch if self._sharding is None else place(batch, self._sharding)

    def _cut(self, start: int, count: int, rows: int) -> Batch:
        """This process's examples from its position `start` on, padded to `rows`."""
        if isinstance(self._source, ArraySource) and self._source.in_memory:
            return self._source.read(self._order(start, start + count), rows)
        return self._source.collate(self._read_ahead(start, count).take(count), rows)

    def _read_ahead(self, start: int, count: int) -> ReadAhead:
        reader = self._reader  # which another thread may close at any time
        if reader is None or not self._stop_reader.alive:
            self.close()
            reader = self._reader = ReadAhead(self._source, self._order, start, count)
            self._stop_reader = weakref.finalize(self, reader.stop)
        return reader


def _checked_size(value: SupportsIndex | jax.Array) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"batch_size must be an integer, got {value!r}.") from error
    if isinstance(value, bool) or not 1 <= size <= MAX_BATCH_SIZE:
        raise ValueError(f"batch_size must be in [1, {MAX_BATCH_SIZE}], got {value!r}.")
    return size
