"""`BatchLoader`: consecutive slices of the endless stream of examples."""

from __future__ import annotations

import operator
import weakref
from types import TracebackType
from typing import Any, Self, SupportsIndex

import jax
import jax.numpy as jnp

from cabs_jax.loader.order import Order
from cabs_jax.loader.read_ahead import ReadAhead
from cabs_jax.loader.sources import ArraySource, Batch, as_source

MAX_BATCH_SIZE = 2**24  # larger ones are accidents, and would exhaust memory before any error


class BatchLoader:
    """Endless batches whose size may change at every step.

    The examples form one endless stream of epochs, each in its own shuffled order. Batches are
    consecutive slices of the stream and may span epochs, so nothing is dropped: whatever the
    sizes, each example appears exactly once per epoch. The order is a function of seed and
    position that is never stored, so a source of any length costs the same memory.

    Arrays in memory are gathered when a batch is cut, which is the only copy. Records and
    memory-mapped arrays are read ahead by a background thread, which starts with the first batch
    and ends with `close`, at the end of a `with` block, with an error, or with the loader itself.

    Args:
        source: examples to load, at least one. A pytree (dict, tuple, single array) is a source of
            arrays of shape (length, ...). A list, or an object with `__len__` and `__getitem__`, is
            a source of records, read with `__getitems__` where it has one; records are pytrees
            of values, stacked leaf by leaf.
        batch_size: size of the first batches; see the attribute.
        seed: non-negative integer that identifies the order.
        shuffle: False gives the source's own order in every epoch.

    Raises:
        TypeError: if `source`, `batch_size` or `seed` is of the wrong type.
        ValueError: if `source` is empty, if its arrays differ in length, if `seed` is negative,
            or if `batch_size` is not positive.

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
    ):
        self._seed = operator.index(seed)
        if self._seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed}")
        self._shuffle = bool(shuffle)
        self._source = as_source(source)
        self._order = Order(self._source.length, self._seed, self._shuffle)
        self._position = 0
        self._reader: ReadAhead | None = None
        self._stop_reader = weakref.finalize(self, lambda: None)
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int | jax.Array:
        """Number of examples in the next batch, settable to an integer or an integer scalar array.

        A `jax.Array` is only read when the next batch is cut, so that setting it does not wait for
        the device; if its value is then not a positive size, the cut raises a ValueError.
        """
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: SupportsIndex | jax.Array) -> None:
        if isinstance(value, jax.Array):
            if isinstance(value, jax.core.Tracer):
                raise TypeError("batch_size must be set outside of jit, got a tracer")
            if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
                raise TypeError(
                    f"batch_size must be an integer scalar, got {value.dtype}{list(value.shape)}"
                )
            value.copy_to_host_async()
            self._batch_size: int | jax.Array = value
        else:
            self._batch_size = _checked_size(value)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next `batch_size` examples: a pytree of numpy arrays of shape (batch_size, ...)."""
        count = _checked_size(self._batch_size)
        batch = self._cut(self._position, count)
        self._position += count
        return batch

    def get_state(self) -> dict[str, int | bool]:
        """What identifies the next example, for JSON; the batch size lives in the optimizer state.

        It depends on neither past batch sizes nor reading ahead.

        Example:
            >>> loader = BatchLoader([3, 1, 4, 1, 5], batch_size=3, seed=7)
            >>> _ = next(loader)
            >>> loader.get_state()
            {'seed': 7, 'position': 3, 'length': 5, 'shuffle': True}
        """
        return {
            "seed": self._seed,
            "position": self._position,
            "length": self._source.length,
            "shuffle": self._shuffle,
        }

    def set_state(self, state: dict[str, int | bool]) -> None:
        """Continues with the example after the last one that was loaded at `get_state`.

        Raises:
            ValueError: if the state belongs to another stream of examples.
        """
        own = self.get_state()
        if state.keys() != own.keys():
            raise ValueError(f"state must have the keys {sorted(own)}, got {sorted(state)}")
        for key in own.keys() - {"position"}:
            if state[key] != own[key]:
                raise ValueError(
                    f"state was saved with {key}={state[key]}, this loader has {key}={own[key]}: "
                    "the order of examples would differ"
                )
        position = operator.index(state["position"])
        if position < 0:
            raise ValueError(f"position must be non-negative, got {position}")
        self.close()
        self._position = position

    def close(self) -> None:
        """Ends the background thread, if there is one; the next batch would start it again."""
        self._stop_reader()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _cut(self, start: int, count: int) -> Batch:
        if isinstance(self._source, ArraySource) and self._source.in_memory:
            return self._source.read(self._order(start, start + count))
        try:
            pieces = self._read_ahead(start, count).take(count)
        except BaseException as error:
            # The reader may hold less than the position says, after Ctrl-C too: read anew.
            self._stop_reader()
            if isinstance(error, StopIteration):
                raise RuntimeError("source raised StopIteration") from error
            raise
        return self._source.collate(pieces, count)

    def _read_ahead(self, start: int, count: int) -> ReadAhead:
        if self._reader is None or not self._stop_reader.alive:
            self.close()
            self._reader = ReadAhead(self._source, self._order, start, count)
            self._stop_reader = weakref.finalize(self, self._reader.stop)
        return self._reader


def _checked_size(value: SupportsIndex | jax.Array) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"batch_size must be an integer, got {value!r}") from error
    if isinstance(value, bool) or not 1 <= size <= MAX_BATCH_SIZE:
        raise ValueError(f"batch_size must be in [1, {MAX_BATCH_SIZE}], got {value!r}")
    return size
