"""How examples are held in blocks, cut into pieces, and made into one batch, padded with zeros."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

Batch: TypeAlias = Any  # a pytree of numpy arrays with a leading example axis

MIN_BLOCK = 16  # examples that are read at a time, at least
TEXT = frozenset("SU")  # kinds of dtypes that differ in the length of their text


class Form(NamedTuple):
    """How a block holds its examples.

    Attributes:
      cut: `cut(block, start, stop)`: a view of the examples `start` to `stop - 1`.
      collate: `collate(pieces, rows)`: one batch of consecutive pieces, followed by zeros, or empty
        text, up to `rows`.
    """

    cut: Callable[[Any, int, int], Any]
    collate: Callable[[Sequence[Any], int], Batch]


def is_list(node: Any) -> bool:
    """A list inside a record is an array, not a subtree: Hugging Face reads vectors as lists."""
    return isinstance(node, list)


def plain(value: Any) -> NDArray[Any]:
    """The array that a value is, or raises where the array would not be all of it."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            "source holds a masked array, whose mask would be lost: fill it, or pass values and "
            "mask as two arrays."
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"a list in a record is not a rectangular array: {error}.") from error
    if array.dtype.kind in TEXT and not isinstance(value, np.ndarray):
        for given, kept in zip(np.asarray(value, object).flat, array.flat, strict=True):
            if given != kept:
                raise TypeError(
                    f"a record holds {type(given).__name__} that numpy's text would change, since "
                    "it ends in a NUL or stands beside values of another type: pass "
                    "np.frombuffer(value, np.uint8), or values of one type."
                )
    return array


def padding(leaf: NDArray[Any], rows: int) -> NDArray[Any]:
    """Rows like those of a leaf, of zeros; of text, empty."""
    rows_of_zeros = np.zeros((rows, *leaf.shape[1:]), leaf.dtype)
    if leaf.dtype == object and leaf.size and isinstance(leaf.flat[0], str | bytes):
        rows_of_zeros.fill(type(leaf.flat[0])())
    return rows_of_zeros


def padded_rows(batch: Batch, rows: int) -> Batch:
    """Nothing but padding, like a batch of at least one example."""
    return jax.tree.map(lambda leaf: padding(leaf, rows), batch)


def warn_of_dtypes(batch: Batch) -> None:
    """Warns of leaves that JAX would convert, or cannot take."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        name = jax.tree_util.keystr(path)
        if leaf.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            reason = "of float64, which JAX rounds to float32: store them so, in half the memory"
        elif leaf.dtype.kind in "OSTU":
            reason = f"of {leaf.dtype}, which JAX has no type for: take them out before the step"
        else:
            continue
        warnings.warn(f"the batches hold values{name} {reason}.", stacklevel=4)


def _slice(block: Batch, start: int, stop: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[start:stop], block)


def _join(pieces: Sequence[Batch], rows: int) -> Batch:
    """One whole piece is not copied."""

    def join(*parts: NDArray[Any]) -> NDArray[Any]:
        _check_dtypes("batches", parts)
        missing = rows - sum(map(len, parts))
        if len(parts) == 1 and not missing:
            return parts[0]
        return np.concatenate([*parts, padding(parts[0], missing)])

    return jax.tree.map(join, *pieces)


def _stack(pieces: Sequence[Sequence[Any]], rows: int) -> Batch:
    flat: list[tuple[list[Any], Any]] = [
        jax.tree.flatten(record, is_leaf=is_list) for piece in pieces for record in piece
    ]
    if not flat[0][0]:
        raise ValueError(f"records hold no values, got {pieces[0][0]!r}.")
    structure = flat[0][1]
    for _, other in flat:
        if other != structure:
            raise ValueError(f"records differ in structure: {structure} and {other}.")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return jax.tree.unflatten(structure, [_stack_column(column, rows) for column in columns])


def _stack_column(column: Sequence[Any], rows: int) -> NDArray[Any]:
    arrays = [plain(value) for value in column]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"records differ in shape: {sorted(shapes)}, and cannot be stacked.")
    _check_dtypes("records", arrays)
    return np.stack([*arrays, *padding(arrays[0][np.newaxis], rows - len(arrays))])


def _check_dtypes(what: str, arrays: Sequence[NDArray[Any]]) -> None:
    dtypes = {array.dtype for array in arrays}
    kinds = {dtype.kind for dtype in dtypes}
    if len(dtypes) > 1 and not (len(kinds) == 1 and kinds < TEXT):
        names = sorted(dtype.name for dtype in dtypes)
        raise ValueError(f"{what} differ in dtype: {names}, and would be converted.")


ARRAYS = Form(_slice, _join)  # a pytree of arrays with a leading example axis
RECORDS = Form(lambda block, start, stop: block[start:stop], _stack)  # a list of pytrees of values
