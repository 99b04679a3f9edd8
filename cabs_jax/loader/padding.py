"""Padding to buckets: many batch sizes, few compiled shapes."""

from __future__ import annotations

import itertools
import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import SupportsIndex, TypeAlias

import numpy as np

PadTo: TypeAlias = SupportsIndex | Sequence[int] | Callable[[int], int]


def buckets(
    min_batch_size: int = 16, max_batch_size: int = 2048, *, count: int = 16, multiple_of: int = 8
) -> tuple[int, ...]:
    """Sizes in geometric progression, for `BatchLoader(pad_to=...)` or for `round_to`.

    If a size m is uniform in log m and the ratio of neighbouring buckets is r, then padding m to
    the next bucket wastes a fraction `1 - (1 - 1/r) / log(r)` of the rows: the defaults give 14 %.

    Args:
      min_batch_size: Smallest size to hold; it gets a bucket of its own.
      max_batch_size: Largest size to hold.
      count: Number of buckets at most, and so of compilations, at least 2.
      multiple_of: What every bucket must be a multiple of, such as the number of shards.

    Returns:
      Increasing multiples of `multiple_of`, at most `count` of them; the last one is
      `max_batch_size` rounded up.

    Raises:
      TypeError: If an argument is no integer.
      ValueError: If they are not positive, `min_batch_size > max_batch_size` or `count < 2`.

    Example:
      >>> buckets(16, 128, count=4)
      (16, 32, 64, 128)
    """
    min_batch_size, max_batch_size, count, multiple_of = map(
        operator.index, (min_batch_size, max_batch_size, count, multiple_of)
    )
    if not 1 <= min_batch_size <= max_batch_size:
        raise ValueError(
            "sizes must satisfy 1 <= min_batch_size <= max_batch_size, got "
            f"{min_batch_size} and {max_batch_size}."
        )
    if count < 2 or multiple_of < 1:
        raise ValueError(f"count must be >= 2 and multiple_of >= 1, got {count} and {multiple_of}.")
    sizes = np.geomspace(min_batch_size, max_batch_size, count).round(9)
    return tuple(sorted({math.ceil(size / multiple_of) * multiple_of for size in sizes}))


def padding_rule(pad_to: PadTo | None, shards: int) -> Callable[[int], int]:
    """A function from the batch size to the number of rows, a multiple of `shards`.

    Args:
      pad_to: One size, increasing sizes to choose the next larger one from, a function, or None
        for batches that are not padded.
      shards: Number of shards of the leading axis.

    Raises:
      TypeError: If `pad_to` is of another type.
      ValueError: If its sizes are not increasing positive multiples of `shards`.
    """
    if pad_to is None:
        return lambda size: _exact(size, shards)
    choose = pad_to if callable(pad_to) else _next_bucket(pad_to, shards)

    def padded(size: int) -> int:
        rows = operator.index(choose(size))
        if rows < size or rows % shards:
            raise ValueError(
                f"pad_to must give at least the batch size {size} and a multiple of the {shards} "
                f"shards of the batch, got {rows}."
            )
        return rows

    return padded


def _exact(size: int, shards: int) -> int:
    if size % shards:
        raise ValueError(
            f"batch size {size} cannot be split over {shards} shards: round sizes to multiples "
            f"(round_to={shards}), or pad them (pad_to=buckets(multiple_of={shards}))."
        )
    return size


def _next_bucket(pad_to: SupportsIndex | Sequence[int], shards: int) -> Callable[[int], int]:
    sizes = pad_to if isinstance(pad_to, Sequence) else (pad_to,)
    buckets = [operator.index(size) for size in sizes]
    increasing = all(a < b for a, b in itertools.pairwise([0, *buckets]))
    if not buckets or not increasing or any(size % shards for size in buckets):
        raise ValueError(
            f"pad_to must hold increasing positive multiples of the {shards} shards of the batch, "
            f"got {pad_to}."
        )

    def choose(size: int) -> int:
        if size > buckets[-1]:
            raise ValueError(f"batch size {size} exceeds the largest bucket {buckets[-1]}.")
        return buckets[bisect_left(buckets, size)]

    return choose
