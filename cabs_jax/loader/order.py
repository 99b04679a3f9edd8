"""The order of examples: a function of (seed, epoch, position), evaluated on demand.

Every epoch is a permutation of `range(length)`, computed pointwise and never stored: a Feistel
network, keyed by seed and epoch, permutes the next power of two, and cycle walking restricts it to
`length` (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cabs_jax.loader.feistel import bits_of, permuted, round_keys

BLOCK = 32768  # positions evaluated at a time, so that numpy's cost per call does not count


class Order:
    """The endless stream of epochs, as indices into the source.

    A process that reads one example in `stride` sees the stream positions `offset`,
    `offset + stride`, `offset + 2 * stride`, ... as its own positions 0, 1, 2, ...

    Args:
      length: Number of examples in an epoch.
      seed: Non-negative integer that identifies the shuffled stream.
      shuffle: Whether to permute each epoch, or to repeat `0, ..., length - 1`.
      offset: First stream position.
      stride: Distance between two stream positions.
    """

    def __init__(self, length: int, seed: int, shuffle: bool, offset: int = 0, stride: int = 1):
        self._length = length
        self._seed = seed
        self._shuffle = shuffle
        self._offset = offset
        self._stride = stride
        # A start and the indices from there on, replaced together: an interruption in between would
        # leave indices of elsewhere.
        self._block = 0, np.empty(0, np.int64)

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        """Indices of the examples at positions `start` to `stop - 1`."""
        first, indices = self._block
        if not first <= start <= stop <= first + len(indices):
            # Blocks amortise numpy's call overhead; a short source pays per epoch, not per block.
            ahead = max(stop, start + min(BLOCK, 16 * self._length))
            positions = self._stream_positions(start, ahead)
            indices = (
                shuffled(positions, self._length, self._seed)
                if self._shuffle
                else (positions % self._length).view(np.int64)
            )
            first, _ = self._block = start, indices
        return indices[start - first : stop - first]

    def epochs(self, start: int, stop: int) -> NDArray[np.uint64]:
        """The epochs that positions `start` to `stop - 1` lie in."""
        return self._stream_positions(start, stop) // self._length

    def _stream_positions(self, start: int, stop: int) -> NDArray[np.uint64]:
        return np.arange(start, stop, dtype=np.uint64) * self._stride + self._offset


def shuffled(positions: NDArray[np.uint64], length: int, seed: int) -> NDArray[np.int64]:
    """Indices of the examples at `positions` of the endless shuffled stream.

    Args:
      positions: (n,) uint64 stream positions; position p lies in epoch `p // length`.
      length: Number of examples in an epoch, at least 1.
      seed: Non-negative integer.

    Returns:
      (n,) int64 indices. Over each epoch they are a permutation of `range(length)`.

    Example:
      >>> positions = np.arange(10, dtype=np.uint64)
      >>> first, second = shuffled(positions, 5, seed=0).reshape(2, 5)
      >>> sorted(first.tolist()), sorted(second.tolist())
      ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    epoch = positions // length
    bits = bits_of(length)
    first, last = int(epoch.min()), int(epoch.max())
    keys = round_keys(seed, np.arange(first, last + 1, dtype=np.uint64).astype(np.uint32), bits)
    if last > first:  # one key for each position, in place of one for all
        keys = [key[(epoch - first).view(np.int64)] for key in keys]

    values: NDArray[np.uint64] = permuted(positions - epoch * length, keys, bits)
    outside = np.flatnonzero(values >= length)
    while outside.size:  # follow the cycle until it re-enters the range
        outside_keys = [key[outside] for key in keys] if last > first else keys
        values[outside] = permuted(values[outside], outside_keys, bits)
        outside = outside[values[outside] >= length]
    return values.view(np.int64)
