"""The order of examples: a function of (seed, epoch, position), evaluated on demand.

Every epoch is a permutation of `range(length)`, computed pointwise and never stored: a Feistel
network, keyed by seed and epoch, permutes the next power of two, and cycle walking restricts it to
`length` (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # with 6, a chi-square test sees the difference from random permutations
SHORT_ROUNDS = 32  # halves of a few bits mix slowly: all n! orders of 6 examples need this many
SHORT_BITS = 10
BLOCK = 32768  # positions evaluated at a time, so that numpy's cost per call does not count


class Order:
    """The endless stream of epochs, as indices into the source.

    A process that reads one example in `stride` sees the stream positions `offset`,
    `offset + stride`, `offset + 2 * stride`, ... as its own positions 0, 1, 2, ...

    Args:
        length: number of examples in an epoch.
        seed: non-negative integer that identifies the shuffled stream.
        shuffle: whether to permute each epoch, or to repeat `0, ..., length - 1`.
        offset: first stream position.
        stride: distance between two stream positions.
    """

    def __init__(self, length: int, seed: int, shuffle: bool, offset: int = 0, stride: int = 1):
        self._length = length
        self._seed = seed
        self._shuffle = shuffle
        self._offset = offset
        self._stride = stride
        self._start = 0
        self._block = np.empty(0, np.int64)

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        """Indices of the examples at positions `start` to `stop - 1`."""
        if not self._start <= start <= stop <= self._start + len(self._block):
            # Blocks amortise numpy's call overhead; a short source pays per epoch, not per block.
            ahead = max(stop, start + min(BLOCK, 16 * self._length))
            positions = np.arange(start, ahead, dtype=np.uint64) * self._stride + self._offset
            self._block = (
                shuffled(positions, self._length, self._seed)
                if self._shuffle
                else (positions % self._length).view(np.int64)
            )
            self._start = start
        return self._block[start - self._start : stop - self._start]


def shuffled(positions: NDArray[np.uint64], length: int, seed: int) -> NDArray[np.int64]:
    """Indices of the examples at `positions` of the endless shuffled stream.

    Args:
        positions: (n,) uint64 stream positions; position p lies in epoch `p // length`.
        length: number of examples in an epoch, at least 1.
        seed: non-negative integer.

    Returns:
        (n,) int64 indices. Over each epoch they are a permutation of `range(length)`.

    Example:
        >>> positions = np.arange(10, dtype=np.uint64)
        >>> first, second = shuffled(positions, 5, seed=0).reshape(2, 5)
        >>> sorted(first.tolist()), sorted(second.tolist())
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    epoch = positions // length
    first, last = int(epoch.min()), int(epoch.max())
    bits = max(2, (length - 1).bit_length())  # at least one bit for each half
    rounds = SHORT_ROUNDS if bits <= SHORT_BITS else ROUNDS
    keys = np.stack([_round_keys(seed, e, rounds) for e in range(first, last + 1)], axis=1)
    if last > first:
        keys = keys[:, (epoch - first).view(np.int64)]

    values = _feistel(positions - epoch * length, keys, bits)
    outside = np.flatnonzero(values >= length)
    while outside.size:  # follow the cycle until it re-enters the range
        outside_keys = keys[:, outside] if keys.shape[1] > 1 else keys
        values[outside] = _feistel(values[outside], outside_keys, bits)
        outside = outside[values[outside] >= length]
    return values.view(np.int64)


def _round_keys(seed: int, epoch: int, rounds: int) -> NDArray[np.uint32]:
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
    return sequence.generate_state(rounds).astype(np.uint32)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint32], bits: int) -> NDArray[np.uint64]:
    """A bijection of `range(2**bits)`, with keys of shape (rounds, 1) or (rounds, n)."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    low = (values & ((1 << low_bits) - 1)).astype(np.uint32)
    high = (values >> low_bits).astype(np.uint32)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        low ^= _hash(high, even) >> (32 - low_bits)
        high ^= _hash(low, odd) >> (32 - high_bits)
    return (high.astype(np.uint64) << np.uint64(low_bits)) | low


def _hash(half: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Two multiply-and-shift steps with xxHash's primes; the high bits are the mixed ones."""
    hashed = half + key
    hashed *= 0x9E3779B1
    hashed ^= hashed >> 15
    hashed *= 0x85EBCA77
    return hashed
