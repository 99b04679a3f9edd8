"""The order of examples, computed on the device: bit for bit that of `order`, in 32-bit integers.

The keys of an epoch are those of numpy's `SeedSequence(seed, spawn_key=(epoch,))`, whose mixing
(O'Neill, "Developing a seed_seq alternative", 2015) is repeated here from the point where the epoch
enters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cabs_jax.loader.order import ROUNDS, SHORT_BITS, SHORT_ROUNDS

INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R = 0xCA01F9DD, 0x4973F715


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


def indices(position: Position, count: int, length: int, seed: int, shuffle: bool) -> jax.Array:
    """Indices, int32 (count,), of the examples from a position on.

    Args:
      position: Of the first of them.
      count: How many.
      length: Number of examples in an epoch, below 2**31 − count.
      seed: Identifies the order, static.
      shuffle: False for the source's own order.
    """
    place = advanced(position, jnp.arange(count, dtype=jnp.int32), length)
    if not shuffle:
        return jnp.asarray(place.offset)
    bits = max(2, (length - 1).bit_length())
    rounds = SHORT_ROUNDS if bits <= SHORT_BITS else ROUNDS
    keys = _round_keys(seed, jnp.asarray(place.epoch).astype(jnp.uint32), rounds)

    def walk(values: jax.Array) -> jax.Array:
        return jnp.where(values < length, values, _feistel(values, keys, bits))

    def outside(values: jax.Array) -> jax.Array:
        return jnp.any(values >= length)

    start = _feistel(jnp.asarray(place.offset).astype(jnp.uint32), keys, bits)
    return lax.while_loop(outside, walk, start).astype(jnp.int32)


def _round_keys(seed: int, epoch: jax.Array, rounds: int) -> list[jax.Array]:
    words = max(4, -(-seed.bit_length() // 32))
    pool = [jnp.uint32(word) for word in np.random.SeedSequence(seed).pool]
    hashes = 4 * words  # that were drawn before the epoch is mixed in
    constant = INIT_A * pow(MULT_A, hashes, 2**32) % 2**32
    for i in range(4):
        hashed, constant = _hashmix(epoch, constant, MULT_A)
        mixed = jnp.uint32(MIX_L) * pool[i] - jnp.uint32(MIX_R) * hashed
        pool[i] = mixed ^ (mixed >> 16)
    keys, constant = [], INIT_B
    for i in range(rounds):
        key, constant = _hashmix(pool[i % 4], constant, MULT_B)
        keys.append(key)
    return keys


def _hashmix(value: jax.Array, constant: int, multiplier: int) -> tuple[jax.Array, int]:
    following = constant * multiplier % 2**32
    value = (value ^ jnp.uint32(constant)) * jnp.uint32(following)
    return value ^ (value >> 16), following


def _feistel(values: jax.Array, keys: list[jax.Array], bits: int) -> jax.Array:
    low_bits = bits // 2
    low = values & jnp.uint32((1 << low_bits) - 1)
    high = values >> low_bits
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        low = low ^ (_hash(high, even) >> (32 - low_bits))
        high = high ^ (_hash(low, odd) >> (32 - bits + low_bits))
    joined: jax.Array = (high << low_bits) | low
    return joined


def _hash(half: jax.Array, key: jax.Array) -> jax.Array:
    hashed = (half + key) * jnp.uint32(0x9E3779B1)
    mixed: jax.Array = (hashed ^ (hashed >> 15)) * jnp.uint32(0x85EBCA77)
    return mixed
