"""The order of examples, computed on the device: that of `order`, in 32-bit integers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.loader.feistel import bits_of, permuted, round_keys


class Position(NamedTuple):
    """A place in the endless stream of examples, int32 scalars.

    `Position(*divmod(p, length))` is stream position p of `BatchLoader.get_state`.

    Attributes:
      epoch: Number of whole epochs before it.
      offset: Number of examples before it in its epoch.

    Example:
    >>> Position(*divmod(2500, 1000))  # in a stream of epochs of 1000 examples
    Position(epoch=2, offset=500)
    """

    epoch: int | jax.Array = 0
    offset: int | jax.Array = 0


def advanced(position: Position, count: int | jax.Array, length: int) -> Position:
    """The position `count` examples later."""
    offset = jnp.asarray(position.offset, jnp.int32) + count
    return Position(position.epoch + offset // length, offset % length)


def indices(
    position: Position, count: int, length: int, seed: int | jax.Array, shuffle: bool
) -> jax.Array:
    """Indices, int32 (count,), of the examples from a position on.

    Args:
      position: Of the first of them.
      count: How many.
      length: Number of examples in an epoch, below 2**31 − count.
      seed: Identifies the order; a non-negative integer, or a traced one below 2**32.
      shuffle: False for the source's own order.
    """
    at = advanced(position, jnp.arange(count, dtype=jnp.int32), length)
    if not shuffle:
        return jnp.asarray(at.offset)
    bits = bits_of(length)
    if not isinstance(seed, int):
        seed = jnp.asarray(seed).astype(jnp.uint32)
    keys = round_keys(seed, jnp.asarray(at.epoch).astype(jnp.uint32), bits)

    def walk(values: jax.Array) -> jax.Array:  # follow the cycles until they re-enter the range
        return jnp.where(values < length, values, permuted(values, keys, bits))

    def outside(values: jax.Array) -> jax.Array:
        return jnp.any(values >= length)

    start = permuted(jnp.asarray(at.offset).astype(jnp.uint32), keys, bits)
    inside: jax.Array = lax.while_loop(outside, walk, start)
    return inside.astype(jnp.int32)
