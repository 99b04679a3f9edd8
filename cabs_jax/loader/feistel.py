"""The permutation of an epoch, computed for each position alone: a keyed Feistel network.

Everything here takes numpy arrays, on the host, and JAX arrays, on the device, and gives both the
same numbers: uint32 arithmetic that wraps around. numpy's scalars would warn of it; arrays do not.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any, TypeAlias

import numpy as np

Words: TypeAlias = Any  # a uint32 array, of numpy or of JAX
Values: TypeAlias = Any  # a uint64 array of numpy, or a uint32 array of JAX

ROUNDS = 8  # with 6, a chi-square test sees the difference from random permutations
SHORT_ROUNDS = 32  # halves of a few bits mix slowly: all n! orders of 6 examples need this many
SHORT_BITS = 10

# The constants of numpy's SeedSequence.
INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R = 0xCA01F9DD, 0x4973F715


def bits_of(length: int) -> int:
    """Returns the number of bits that hold `range(length)`, at least one for each half."""
    return max(2, (length - 1).bit_length())


def round_keys(seed: int | Words, epoch: Words, bits: int) -> list[Words]:
    """Returns the keys of the rounds of an epoch's permutation.

    They are what numpy's `SeedSequence(seed, spawn_key=(epoch,))` generates. Its mixing (O'Neill,
    "Developing a seed_seq alternative", 2015) is repeated here from the point where the epoch
    enters, so that many epochs are one computation.

    Args:
      seed: Non-negative integer; or one that is traced, a uint32 scalar, which gives the same keys.
      epoch: Indices of the epochs, uint32; after 2**32 epochs their orders repeat.
      bits: Of the values to permute, which decides on the number of rounds.

    Returns:
      One array like `epoch` for each round.
    """
    if isinstance(seed, int):
        words = max(4, -(-seed.bit_length() // 32))
        entropy = [np.asarray([word]) for word in np.random.SeedSequence(seed).pool]
    else:
        words, entropy = 4, _pool(seed)
    hashes = 4 * words  # that were drawn before the epoch is mixed in
    constant = INIT_A * pow(MULT_A, hashes, 2**32) % 2**32
    pool = []
    for word in entropy:
        hashed, constant = _hashmix(epoch, constant, MULT_A)
        pool.append(_mix(word, hashed))
    keys, constant = [], INIT_B
    for i in range(SHORT_ROUNDS if bits <= SHORT_BITS else ROUNDS):
        key, constant = _hashmix(pool[i % 4], constant, MULT_B)
        keys.append(key)
    return keys


def permuted(values: Values, keys: list[Words], bits: int) -> Values:
    """Applies a bijection of `range(2**bits)`.

    Args:
      values: Array of unsigned integers, (n,); on the device uint32, so that bits are at most 32.
      keys: Of each round, uint32, (1,) or (n,).
      bits: Number of bits of the values.
    """
    low_bits = bits // 2
    high_bits = bits - low_bits
    low = (values & ((1 << low_bits) - 1)).astype(np.uint32)
    high = (values >> low_bits).astype(np.uint32)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        low ^= _hash(high, even) >> (32 - low_bits)
        high ^= _hash(low, odd) >> (32 - high_bits)
    return (high.astype(values.dtype) << low_bits) | low


def _pool(seed: Words) -> list[Words]:
    """Returns what is `SeedSequence(seed).pool` for a seed of one word."""
    pool, constant = [], INIT_A
    for word in (seed, *[seed ^ seed] * 3):
        hashed, constant = _hashmix(word, constant, MULT_A)
        pool.append(hashed)
    for source, target in permutations(range(4), 2):
        hashed, constant = _hashmix(pool[source], constant, MULT_A)
        pool[target] = _mix(pool[target], hashed)
    return pool


def _mix(word: Words, hashed: Words) -> Words:
    mixed = np.uint32(MIX_L) * word - np.uint32(MIX_R) * hashed
    return mixed ^ (mixed >> 16)


def _hashmix(value: Words, constant: int, multiplier: int) -> tuple[Words, int]:
    following = constant * multiplier % 2**32
    mixed = (value ^ np.uint32(constant)) * np.uint32(following)
    return mixed ^ (mixed >> 16), following


def _hash(half: Words, key: Words) -> Words:
    """Two multiply-and-shift steps with xxHash's primes; the high bits are the mixed ones."""
    hashed = half + key
    hashed *= np.uint32(0x9E3779B1)
    hashed ^= hashed >> 15
    hashed *= np.uint32(0x85EBCA77)
    return hashed
