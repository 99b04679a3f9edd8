"""Sources of examples: arrays that are gathered from, or records that are stacked.

Both read a block of examples at given indices, cut pieces from blocks, and collate consecutive
pieces into one batch, padded with zeros to a number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

Batch: TypeAlias = Any  # a pytree of numpy arrays with a leading example axis
Indices: TypeAlias = NDArray[np.int64]


class ArraySource:
    """A pytree of arrays of shape (length, ...).

    Attributes:
      length: Number of examples.
      in_memory: False if a leaf is mapped from a file, so that reading it may wait for the disk.
    """

    def __init__(self, arrays: Any):
        leaves, self._structure = jax.tree.flatten(arrays)
        self._leaves = [_plain(leaf) for leaf in leaves]
        shapes = [leaf.shape for leaf in self._leaves]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                "source must be a pytree of arrays that share their leading axis, got shapes "
                f"{sorted(set(shapes))}; pass a list of records to have examples stacked."
            )
        self.length = shapes[0][0]
        self.in_memory = not any(_is_memory_mapped(leaf) for leaf in self._leaves)

    def read(self, indices: Indices, rows: int | None = None) -> Batch:
        """Gathers the examples at `indices`, followed by zeros up to `rows`."""
        rows = len(indices) if rows is None else rows
        gathered = [_gather(leaf, indices, rows) for leaf in self._leaves]
        return jax.tree.unflatten(self._structure, gathered)

    def cut(self, block: Batch, start: int, stop: int) -> Batch:
        """A view of the block's examples `start` to `stop - 1`."""
        return jax.tree.map(lambda leaf: leaf[start:stop], block)

    def collate(self, pieces: Sequence[Batch], rows: int) -> Batch:
        """Joins pieces, followed by zeros up to `rows`; one whole piece is not copied."""

        def join(*parts: NDArray[Any]) -> NDArray[Any]:
            missing = rows - sum(map(len, parts))
            if len(parts) == 1 and not missing:
                return parts[0]
            return np.concatenate([*parts, _padding(parts[0], missing)])

        return jax.tree.map(join, *pieces)


class RecordSource:
    """Records, each a pytree of values of equal shape, read one by one or with `__getitems__`.

    Attributes:
      length: Number of records.
      in_memory: Always False, since reading a record may run any code.
    """

    in_memory = False

    def __init__(self, records: Any):
        self.length = len(records)
        self._records = records
        self._read_many: Callable[[list[int]], Sequence[Any]] | None = getattr(
            records, "__getitems__", None
        )

    def read(self, indices: Indices) -> Sequence[Any]:
        """The records at `indices`."""
        plain = indices.tolist()  # many sources accept nothing but Python integers
        if self._read_many is None:
            return [self._records[index] for index in plain]
        records = list(self._read_many(plain))
        if len(records) != len(plain):
            raise ValueError(
                f"source.__getitems__ returned {len(records)} records for {len(plain)} indices."
            )
        return records

    def cut(self, block: Sequence[Any], start: int, stop: int) -> Sequence[Any]:
        """The block's records `start` to `stop - 1`."""
        return block[start:stop]

    def collate(self, pieces: Sequence[Sequence[Any]], rows: int) -> Batch:
        """Stacks records leaf by leaf, followed by zeros up to `rows`.

        A list inside a record is an array, not a subtree: Hugging Face reads vectors as lists.
        """
        flat: list[tuple[list[Any], Any]] = [
            jax.tree.flatten(record, is_leaf=lambda node: isinstance(node, list))
            for piece in pieces
            for record in piece
        ]
        if not flat[0][0]:
            raise ValueError(f"records hold no values, got {pieces[0][0]!r}.")
        structure = flat[0][1]
        for _, other in flat:
            if other != structure:
                raise ValueError(f"records differ in structure: {structure} and {other}.")
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        return jax.tree.unflatten(structure, [_stack(column, rows) for column in columns])


def as_source(source: Any) -> ArraySource | RecordSource:
    """Wraps arrays or records.

    Raises:
      TypeError: If `source` is neither.
      ValueError: If it holds no examples, or arrays whose leading axes differ.
    """
    is_text = isinstance(source, str | bytes)
    is_array = hasattr(source, "__array__") and hasattr(source, "shape")
    is_opaque = jax.tree_util.all_leaves([source])
    wrapped: ArraySource | RecordSource
    if is_array or not (is_opaque or isinstance(source, list)):
        wrapped = ArraySource(source)
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__") and not is_text:
        wrapped = RecordSource(source)
    else:
        raise TypeError(
            "source must be a pytree of arrays, a list of records, or an object with __len__ and "
            f"__getitem__, got {type(source).__name__}."
        )
    if wrapped.length < 1:
        raise ValueError("source holds no examples.")
    return wrapped


def _plain(value: Any) -> NDArray[Any]:
    """The array that a value is, or raises where the array would not be all of it."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            "source holds a masked array, whose mask would be lost: fill it, or pass values and "
            "mask as two arrays."
        )
    if isinstance(value, str | bytes) and value[-1:] in ("\0", b"\0"):
        raise TypeError(
            f"a record holds {type(value).__name__} that ends in a NUL, which numpy's text drops: "
            "pass np.frombuffer(value, np.uint8)."
        )
    return np.asarray(value)


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
    gathered[count:] = _padding(leaf, rows - count)
    return gathered


def _padding(leaf: NDArray[Any], rows: int) -> NDArray[Any]:
    """Rows like those of a leaf, of zeros; of text, empty."""
    padding = np.zeros((rows, *leaf.shape[1:]), leaf.dtype)
    if leaf.dtype == object and leaf.size and isinstance(leaf.flat[0], str | bytes):
        padding.fill(type(leaf.flat[0])())
    return padding


def _stack(column: Sequence[Any], rows: int) -> NDArray[Any]:
    try:
        arrays = [_plain(value) for value in column]
    except ValueError as error:
        raise ValueError(f"a list in a record is not a rectangular array: {error}.") from error
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"records differ in shape: {sorted(shapes)}, and cannot be stacked.")
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) > 1 and {dtype.kind for dtype in dtypes} - {"S", "U"}:
        names = sorted(dtype.name for dtype in dtypes)
        raise ValueError(f"records differ in dtype: {names}, and would be converted.")
    padding = _padding(arrays[0][np.newaxis], rows - len(arrays))
    return np.stack([*arrays, *padding])
