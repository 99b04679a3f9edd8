"""From the size a rule asks for, a float, to the nearest batch size that is legal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cabs_jax._arguments import INT32_MAX, check_batch_size, is_traced

RoundTo = ArrayLike | Sequence[int]


class LegalSizes(NamedTuple):
    """The batch sizes to choose from; made by `legal_sizes`, which checks them.

    Attributes:
      minimum: Smallest size allowed: an int, or a traced int32 scalar.
      maximum: Largest size allowed, likewise.
      round_to: An int k, or a traced int32 scalar, for multiples of k; or an increasing tuple of
        ints, the sizes themselves.
    """

    minimum: int | jax.Array
    maximum: int | jax.Array
    round_to: int | jax.Array | tuple[int, ...]


def legal_sizes(
    min_batch_size: ArrayLike, max_batch_size: ArrayLike, round_to: RoundTo = 1
) -> LegalSizes:
    """Checks the bounds and the sizes between them.

    Args:
      min_batch_size: Smallest size allowed.
      max_batch_size: Largest size allowed, at most 2**31 − 1.
      round_to: An int k for multiples of k, or an increasing tuple of legal sizes.

    Returns:
      The legal sizes.

    Raises:
      ValueError: If an argument is no whole number in [1, 2**31 − 1], if min_batch_size exceeds
        max_batch_size, if the tuple is empty or does not increase, or if no legal size lies within
        the bounds. Relations between traced values are not checked.
    """
    minimum = check_batch_size("min_batch_size", min_batch_size)
    maximum = check_batch_size("max_batch_size", max_batch_size)
    bounds_known = not (is_traced(minimum) or is_traced(maximum))
    if bounds_known and minimum > maximum:
        raise ValueError(
            f"min_batch_size must not exceed max_batch_size, got {minimum} and {maximum}."
        )

    if isinstance(round_to, (tuple, list)):
        sizes = tuple(int(check_batch_size("each size in round_to", size)) for size in round_to)
        if not sizes or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(
                f"round_to must be a multiple or an increasing tuple of sizes, got {round_to!r}."
            )
        if bounds_known and not any(minimum <= size <= maximum for size in sizes):
            raise ValueError(_nothing_between(minimum, maximum, f"none of round_to={sizes}"))
        return LegalSizes(minimum, maximum, sizes)

    multiple = check_batch_size("round_to", round_to)
    if bounds_known and not is_traced(multiple) and -(-minimum // multiple) > maximum // multiple:
        raise ValueError(_nothing_between(minimum, maximum, f"no multiple of round_to={multiple}"))
    return LegalSizes(minimum, maximum, multiple)


def check_initial_batch_size(
    initial_batch_size: ArrayLike | None, legal: LegalSizes
) -> int | jax.Array:
    """Returns the size to start from, not rounded yet; the minimum where none is given.

    Raises:
      ValueError: If it lies outside the bounds.
    """
    if initial_batch_size is None:
        return legal.minimum
    size = check_batch_size("initial_batch_size", initial_batch_size)
    known = not any(map(is_traced, (size, legal.minimum, legal.maximum)))
    if known and not legal.minimum <= size <= legal.maximum:
        raise ValueError(
            f"initial_batch_size must lie within [min_batch_size, max_batch_size] = "
            f"[{legal.minimum}, {legal.maximum}], got {size}."
        )
    return size


def nearest_legal_size(raw: jax.Array, legal: LegalSizes) -> jax.Array:
    """Rounds to the nearest legal size within the bounds.

    Multiples of k are nearest in distance, ties going to the even multiple. The sizes of a tuple
    are nearest in ratio, ties going to the smaller.

    Args:
      raw: Size asked for, float32 scalar; infinite is as good as very large. Must not be NaN.
      legal: The legal sizes.

    Returns:
      An int32 scalar.

    >>> float32 = jnp.float32
    >>> int(nearest_legal_size(float32(40.0), legal_sizes(16, 2048, round_to=16)))  # 2.5 · 16
    32
    >>> int(nearest_legal_size(float32(40.0), legal_sizes(16, 2048, round_to=(16, 32, 64))))
    32
    >>> int(nearest_legal_size(float32(jnp.inf), legal_sizes(16, 2048)))
    2048
    """
    minimum, maximum, round_to = legal
    if isinstance(round_to, tuple):
        sizes = np.asarray(round_to, np.int32)
        wide = sizes.astype(np.float64)
        midpoints = np.sqrt(wide[:-1] * wide[1:]).astype(np.float32)
        index = jnp.sum(raw > midpoints, dtype=jnp.int32)
        first = jnp.sum(sizes < minimum, dtype=jnp.int32)
        last = jnp.sum(sizes <= maximum, dtype=jnp.int32) - 1
        return jnp.asarray(sizes)[jnp.clip(index, first, last)]
    index = _to_int32(jnp.round(raw / jnp.asarray(round_to, jnp.float32)))
    size = jnp.clip(index, -(-minimum // round_to), maximum // round_to) * round_to
    return size.astype(jnp.int32)


def _to_int32(whole: jax.Array) -> jax.Array:
    """Casts a float32 without overflow, values from 2**31 on becoming 2**31 − 1."""
    largest = np.nextafter(np.float32(2**31), np.float32(0))
    cast = jnp.clip(whole, 0, largest).astype(jnp.int32)
    return jnp.where(whole > largest, INT32_MAX, cast)


def _nothing_between(minimum: int | jax.Array, maximum: int | jax.Array, what: str) -> str:
    return (
        f"{what} lies in [{minimum}, {maximum}]: widen min_batch_size and max_batch_size, "
        "or change round_to."
    )
