"""Sources that are read at any position: arrays that are gathered from, or records in a row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

from cabs_jax.loader.collation import ARRAYS, MIN_BLOCK, RECORDS, Batch, padding, plain
from cabs_jax.loader.streams import Stream

Indices: TypeAlias = NDArray[np.int64]
Epochs: TypeAlias = NDArray[np.uint64]


class ArraySource:
    """A pytree of arrays of shape (length, ...).

    Attributes:
      length: Number of examples.
      in_memory: False if a leaf lies in a file, so that reading it may wait for the disk.
    """

    form = ARRAYS

    def __init__(self, arrays: Any):
        leaves, self._structure = jax.tree.flatten(arrays)
        self._leaves = [leaf if _is_in_file(leaf) else plain(leaf) for leaf in leaves]
        shapes = [leaf.shape for leaf in self._leaves]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                "source must be a pytree of arrays that share their leading axis, got shapes "
                f"{sorted(set(shapes))}; pass a list of records to have examples stacked."
            )
        self.length: int = shapes[0][0]
        self.in_memory = not any(
            _is_in_file(leaf) or _is_memory_mapped(leaf) for leaf in self._leaves
        )

    def read(self, indices: Indices, epochs: Epochs) -> Batch:
        """The examples at `indices`, the same in all epochs."""
        return self.read_rows(indices, len(indices))

    def read_rows(self, indices: Indices, rows: int) -> Batch:
        """Gathers the examples at `indices`, followed by zeros up to `rows`."""
        gathered = [
            (_gather_chunks if _is_in_file(leaf) else _gather)(leaf, indices, rows)
            for leaf in self._leaves
        ]
        return jax.tree.unflatten(self._structure, gathered)

    def block_size(self, batch_size: int) -> int:
        """Whole batches, which then need not be joined."""
        return max(batch_size, MIN_BLOCK)


class RecordSource:
    """Records, each a pytree of values of equal shape.

    They are read with the first of these that the object has: `record(index, epoch)`,
    `__getitems__(indices)`, `__getitem__(index)`. A Grain `MapDataset` is asked for the index in
    its own endless repetition, which it seeds random transformations with.

    Attributes:
      length: Number of records.
      in_memory: Always False, since reading a record may run any code.
    """

    form = RECORDS
    in_memory = False

    def __init__(self, records: Any):
        self.length = len(records)
        self._read, self._together = _reader_of(records, self.length)

    def read(self, indices: Indices, epochs: Epochs) -> list[Any]:
        """The records at `indices`, in epochs that may differ."""
        # Many sources accept nothing but Python integers.
        return self._read(indices.tolist(), epochs.tolist())

    def block_size(self, batch_size: int) -> int:
        """Few, since they may be slow; more of those that are better read together."""
        return max(MIN_BLOCK, batch_size // 8) if self._together else MIN_BLOCK


def as_source(
    source: Any, *, batched: bool = False, epochs: int | None = None
) -> ArraySource | RecordSource | Stream:
    """Wraps arrays, records or a stream.

    Raises:
      TypeError: If `source` is none of them.
      ValueError: If it holds no examples, or arrays whose leading axes differ, or cannot be read
        as `batched` and `epochs` ask.
    """
    is_text = isinstance(source, str | bytes)
    is_array = _is_in_file(source) or (hasattr(source, "__array__") and hasattr(source, "shape"))
    is_opaque = jax.tree_util.all_leaves([source])
    is_iterable = hasattr(source, "__iter__") and not is_text
    is_indexable = hasattr(source, "__len__") and hasattr(source, "__getitem__") and not is_text
    if is_array or not (is_opaque or isinstance(source, list)):
        if batched:
            raise ValueError("batched=True is for a stream of batches, and source holds arrays.")
        wrapped: ArraySource | RecordSource = ArraySource(source)
    elif is_iterable and (batched or not is_indexable or _is_iterable_dataset(source)):
        return Stream(source, batched=batched, epochs=epochs)
    elif is_indexable:
        wrapped = RecordSource(source)
    else:
        raise TypeError(
            "source must be a pytree of arrays, a list of records, an object with __len__ and "
            f"__getitem__, or an iterable, got {type(source).__name__}."
        )
    if wrapped.length < 1:
        raise ValueError("source holds no examples.")
    return wrapped


def _reader_of(
    records: Any, length: int
) -> tuple[Callable[[list[int], list[int]], list[Any]], bool]:
    """How to read records at indices in epochs, and whether that is one call."""
    if hasattr(records, "record"):
        return lambda indices, epochs: list(map(records.record, indices, epochs)), False
    if _is_instance(records, "grain", "MapDataset"):
        repeated = records.repeat()
        return lambda indices, epochs: [
            repeated[epoch * length + index] for index, epoch in zip(indices, epochs, strict=True)
        ], False
    if hasattr(records, "__getitems__"):
        return lambda indices, epochs: _read_together(records.__getitems__, indices), True
    return lambda indices, epochs: [records[index] for index in indices], False


def _read_together(read: Callable[[list[int]], Sequence[Any]], indices: list[int]) -> list[Any]:
    records = list(read(indices))
    if len(records) != len(indices):
        raise ValueError(
            f"source.__getitems__ returned {len(records)} records for {len(indices)} indices."
        )
    return records


def _is_instance(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class that it cannot be of unless its module is imported."""
    kind = getattr(sys.modules.get(module), name, ())
    return isinstance(value, kind)


def _is_iterable_dataset(source: Any) -> bool:
    """Whether it is torch's, which has a `__getitem__` that raises, and perhaps a length."""
    return _is_instance(source, "torch.utils.data", "IterableDataset")


def _is_in_file(array: Any) -> bool:
    """Whether an array is one of h5py or zarr, or alike: stored in chunks, sliced to be read."""
    chunks = getattr(array, "chunks", False)  # h5py: None if it is stored in one piece
    chunked = chunks is None or (isinstance(chunks, tuple) and isinstance(chunks[0], int))
    return chunked and hasattr(array, "shape") and hasattr(array, "dtype")


def _is_memory_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def _gather(leaf: NDArray[Any], indices: Indices, rows: int) -> NDArray[Any]:
    count = len(indices)
    # `take` is faster than indexing, but would first copy the whole of an array with gaps. Indices
    # are in range: mode="clip" only saves it from gathering into a second buffer to check them.
    without_gaps = leaf.flags.c_contiguous and leaf.flags.aligned
    if rows == count:
        return leaf.take(indices, axis=0, mode="clip") if without_gaps else leaf[indices]
    gathered = np.empty((rows, *leaf.shape[1:]), leaf.dtype)
    if without_gaps:
        leaf.take(indices, axis=0, out=gathered[:count], mode="clip")
    else:
        gathered[:count] = leaf[indices]
    gathered[count:] = padding(leaf, rows - count)
    return gathered


def _gather_chunks(leaf: Any, indices: Indices, rows: int) -> NDArray[Any]:
    """Gathers from a file: one slice of each chunk that holds any of the examples."""
    chunk = (leaf.chunks or (MIN_BLOCK,))[0]
    in_order = np.argsort(indices, kind="stable")
    boundaries = np.flatnonzero(np.diff(indices[in_order] // chunk)) + 1
    gathered = np.empty((rows, *leaf.shape[1:]), leaf.dtype)
    for places in np.split(in_order, boundaries):
        wanted = indices[places]
        if len(wanted):
            first = int(wanted[0])
            gathered[places] = leaf[first : int(wanted[-1]) + 1][wanted - first]
    gathered[len(indices) :] = padding(gathered, rows - len(indices))
    return gathered
