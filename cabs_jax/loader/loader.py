"""`BatchLoader`: consecutive slices of the endless stream of examples."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Self, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cabs_jax._arguments import check_non_negative
from cabs_jax._closing import Closing
from cabs_jax.loader.collation import Batch, padded_rows, warn_of_dtypes
from cabs_jax.loader.device_order import Position
from cabs_jax.loader.feeds import Cursor, Feed, OrderedFeed, Share, StreamFeed
from cabs_jax.loader.padding import PadTo, padding_rule
from cabs_jax.loader.placement import place, placement
from cabs_jax.loader.saved import MAX_BATCH_SIZE, check_size, check_state, saved_sizes
from cabs_jax.loader.sources import as_source
from cabs_jax.loader.streams import Stream

_copy = jax.jit(jnp.copy)  # 7 microseconds; dispatched alone, the copy costs 44


class BatchLoader(Closing):
    """Batches whose size may change at every step, from arrays, records or any stream.

    Arrays and records form one endless stream of epochs, each in its own shuffled order. Batches
    are consecutive slices of it and may span epochs, so nothing is dropped: whatever the sizes,
    each example appears exactly once per epoch. The order is a function of seed and position that
    is never stored, so a source of any length costs the same memory.

    Any other iterable is read in the order it gives, one pass after the other, and re-cut into
    batches: torch's `DataLoader`, Hugging Face's streaming data sets, Grain's `IterDataset`,
    tf.data, generators. Each example appears once per epoch as far as the iterable gives it once.
    An iterator, such as a generator, is passed over once.

    Arrays in memory are gathered when a batch is cut, which is the only copy. All else is read
    ahead by background threads, which start with the first batch and end with `close`, at the end
    of a `with` block, with an error, or with the loader itself.

    Threads may share a loader: each batch goes to one of them. Processes may not: a loader is
    neither copied nor pickled, and in a forked process it raises; make one in each, and continue
    with `set_state`.

    Args:
      source: Examples to load, at least one. A pytree (dict, tuple, single array) is a source of
        arrays of shape (length, ...), those of h5py and zarr among them, which are read in slices.
        A list, or an object with `__len__` and `__getitem__`, is a source of records, pytrees of
        values that are stacked leaf by leaf. They are read with `record(index, epoch)` where the
        object has it, which may augment them differently in every epoch, else with `__getitems__`,
        else one by one; the random transformations of a Grain `MapDataset` differ by epoch. Any
        other iterable is a stream of records.
      batch_size: Size of the first batches; see the attribute.
      seed: Non-negative integer that identifies the order; a stream's is its own.
      shuffle: False gives the source's own order in every epoch. None, the default, shuffles all
        but streams, which cannot be.
      sharding: Yields global arrays sharded so, such as `NamedSharding(mesh, P("data"))`. Each
        process reads only its own share of the examples, one in as many as there are
        shares, whatever the sizes: the batch holds the same examples as on one process, in
        another order. Sizes must be multiples of the number of shards, unless padded, and at
        least the number of processes. The transfer to the devices is not waited for. Of a stream,
        each process is given its own share; see `epochs` for where it ends.
      pad_to: Yields `(batch, mask)`, padded with zeros, or empty text, to one size, to the next
        larger of several (see `buckets`), or to `pad_to(size)`; `mask`, of shape (rows,), is True
        for examples.
      lag: Every size takes effect `lag` batches late. With 1, batch k + 1 is cut with the size
        that step k - 1 gave, so that cutting and transferring it overlap step k.
      batched: Whether the items of a stream are batches, of any sizes.
      epochs: Number of epochs after which the loader ends, the last batch holding what is left.
        None is endless, except for an iterator. Where processes have their own streams, the
        loader ends when all of them have; to agree on it they wait for each other, and for the
        step before, at every batch.
      num_threads: How many threads read records, or arrays in files: the source must allow that.
        The order is the same. A stream is read by one; let its processes, such as those of Grain's
        `mp_prefetch` or a `DataLoader`, do the work.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If `source` is empty, if its arrays differ in length, if `seed` or `lag` is
        negative, if `batch_size`, `epochs` or `num_threads` is not positive, if a stream is to be
        shuffled or read by several threads, or an iterator more than once, if `pad_to` is not
        increasing multiples of the number of shards, if it is missing where the last batch
        may not split over them, or if `sharding` splits another axis than the leading one.

    Example:
      >>> import numpy as np
      >>> loader = BatchLoader({"x": np.arange(5)}, batch_size=2, shuffle=False)
      >>> next(loader)
      {'x': array([0, 1])}
      >>> loader.batch_size = 4
      >>> next(loader)
      {'x': array([2, 3, 4, 0])}
      >>> [len(batch) for batch in BatchLoader(iter(range(100)), batch_size=64)]
      [64, 36]
    """

    def __init__(
        self,
        source: Any,
        batch_size: SupportsIndex | jax.Array = 16,
        seed: int = 0,
        *,
        shuffle: bool | None = None,
        sharding: Sharding | None = None,
        pad_to: PadTo | None = None,
        lag: int = 0,
        batched: bool = False,
        epochs: int | None = None,
        num_threads: int = 1,
    ):
        self._seed = check_non_negative("seed", seed)
        self._lag = check_non_negative("lag", lag)
        num_threads = _positive("num_threads", num_threads)
        epochs = None if epochs is None else _positive("epochs", epochs)
        wrapped = as_source(source, batched=batched, epochs=epochs)
        self._sharding = sharding
        self._placement = placement(sharding)
        self._rows = padding_rule(pad_to, self._placement.shards)
        self._masked = pad_to is not None
        self._feed: Feed
        if isinstance(wrapped, Stream):
            _check_stream(wrapped, shuffle, num_threads)
            self._feed = StreamFeed(wrapped, self._placement, sharding)
            self._check_last_batch(wrapped.epochs, None)
        else:
            order = self._seed, shuffle is None or bool(shuffle)
            self._feed = OrderedFeed(wrapped, *order, self._placement, epochs, num_threads)
            self._check_last_batch(epochs, wrapped.length)
        self._cursor = self._feed.start
        self._example: Batch | None = None  # the first one, once it is known
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
            self._batch_size = check_size(value)

    @property
    def epoch(self) -> int:
        """Number of whole epochs before the next example.

        The end of a stream's pass is only known when the example after it is asked for.
        """
        return int(self.position.epoch)

    @property
    def position(self) -> Position:
        """Epoch and offset of the next example; of a stream, among those of this process."""
        return self._feed.position(self._cursor)

    @property
    def examples_seen(self) -> int:
        """Number of examples before the next one in all epochs and on all processes."""
        return self._cursor.position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The next `batch_size` examples, fewer at the end of the last epoch.

        Returns:
          A pytree of numpy arrays of shape (batch_size, ...), or of global `jax.Array`s with
          `sharding`. With `pad_to`, a pair of that and the mask.
        """
        with self._alone("next"):
            cursor = self._cursor
            sizes = (*cursor.earlier_sizes, self._batch_size)
            try:
                size = self._size(sizes[0])
            except Exception:  # were it kept, it would stand in the way of those set after it
                self._cursor = cursor._replace(earlier_sizes=cursor.earlier_sizes[1:])
                raise
            try:
                share = self._feed.share(cursor, size)
                if share.total:
                    batch = self._batch(share)
                    pending = sizes[1:] if len(sizes) > self._lag else sizes
                    self._cursor = Cursor(
                        cursor.position + share.total, cursor.own + share.own, pending, share.place
                    )
                    self._feed.release(self._cursor)
            except BaseException as error:  # Ctrl-C too
                self._feed.fail()
                if isinstance(error, StopIteration):
                    raise RuntimeError("source raised StopIteration.") from error
                raise
            if not share.total:
                raise StopIteration
            return batch

    def get_state(self) -> dict[str, Any]:
        """What identifies the next example and the size of its batch, for JSON.

        It depends on neither past batch sizes nor reading ahead. With `lag`, it includes the sizes
        that are still to take effect, without those that the next batches would refuse.

        Of arrays and records it is the same for all processes, whatever their number. Of a stream
        each process has its own, for JSON as far as the source's own state is.

        Raises:
          TypeError: If a stream cannot say where it stands: neither the source nor its iterator has
            `get_state` and `set_state`, or `state_dict` and `load_state_dict`.

        Example:
          >>> loader = BatchLoader([3, 1, 4, 1, 5], batch_size=3, seed=7)
          >>> _ = next(loader)
          >>> loader.get_state()
          {'seed': 7, 'length': 5, 'shuffle': True, 'position': 3, 'batch_size': 3}
        """
        cursor = self._cursor
        return {
            **self._feed.identity(),
            "position": cursor.position,
            **self._feed.state(cursor),
            **saved_sizes(self.batch_size, cursor.earlier_sizes, self._lag),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with the example after the last one that was loaded at `get_state`.

        A state without a size leaves that as it is.

        Raises:
          TypeError: If it is no mapping, or holds something else than numbers where they belong, or
            if the stream is an iterator that cannot be told where to go.
          ValueError: If it is incomplete, belongs to another stream of examples, or holds a
            position or a size that no loader can have. The loader then stays as it was.
        """
        size, sizes = check_state(state, self._feed.identity(), self._feed.counts)
        self.close()  # which ends a wait in another thread
        with self._alone("set_state"):
            self._feed, cursor = self._feed.resumed(state, self._cursor)
            self._cursor = cursor._replace(earlier_sizes=sizes[-self._lag :] if self._lag else ())
            if size is not None:
                self._batch_size = size

    def close(self) -> None:
        """Ends the background threads, if there are any; the next batch would start them again.

        It waits for the records that they are reading, but at most a second: a thread that its
        source holds up longer ends with the call that it is in.
        """
        reader = self._feed.reader
        if reader is not None and os.getpid() == self._process:
            reader.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BatchLoader cannot be copied or pickled: make another from the same source and "
            "seed, and continue with other.set_state(loader.get_state())."
        )

    @contextmanager
    def _alone(self, caller: str) -> Iterator[None]:
        """Keeps other threads waiting, and refuses what could only go wrong."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{caller} on a loader that process {self._process} made, in its fork "
                f"{os.getpid()}: make a loader in each process, and continue with set_state."
            )
        reader = self._feed.reader
        if reader is not None and threading.current_thread() in reader.threads:
            raise RuntimeError(f"{caller} was called by the loader's own source.")
        with self._lock:
            if self._busy:  # with this very thread: the lock keeps out all others
                raise RuntimeError(f"{caller} was called while this thread is cutting a batch.")
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    def _check_last_batch(self, epochs: int | None, length: int | None) -> None:
        shards = self._placement.shards
        splits = epochs is None or (length is not None and epochs * length % shards == 0)
        if shards > 1 and not (splits or self._masked):
            raise ValueError(
                f"the last batch holds what is left, which may not split over {shards} shards: "
                f"pass pad_to=buckets(multiple_of={shards}), or epochs=None."
            )

    def _size(self, value: int | jax.Array) -> int:
        """The number of examples of the next batch, on all processes."""
        read_from, size = self._last_read
        if read_from is not value:
            size = check_size(value)
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
        return size

    def _batch(self, share: Share) -> Any:
        rows = self._rows(share.room) // self._placement.readers
        if share.own:
            batch = share.collate(rows)
        else:
            if self._example is None:
                self._example = self._feed.some_example()
            batch = padded_rows(self._example, rows)
        if self._example is None:
            self._example = jax.tree.map(lambda leaf: leaf[:1].copy(), batch)
            warn_of_dtypes(batch)
        if self._masked:
            batch = batch, np.arange(rows) < share.own
        return batch if self._sharding is None else place(batch, self._sharding)


def _check_stream(stream: Stream, shuffle: bool | None, num_threads: int) -> None:
    if shuffle:
        raise ValueError(
            "a stream cannot be shuffled here, got shuffle=True: shuffle it before, or pass a "
            "source with __len__ and __getitem__."
        )
    if num_threads > 1:
        raise ValueError(
            f"a stream is read by one thread, got num_threads={num_threads}: let its own workers "
            "do more (Grain's mp_prefetch, num_workers of a DataLoader)."
        )


def _positive(name: str, value: Any) -> int:
    number = check_non_negative(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number
