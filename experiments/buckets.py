"""Few shapes for many batch sizes: every new shape costs a compilation."""

from typing import Any

import jax
import numpy as np

COUNT = 16


def buckets(smallest: int, largest: int, count: int = COUNT) -> tuple[int, ...]:
    """At most `count` increasing sizes from `smallest` to `largest`, evenly spaced in ratio.

    With 16 of them between 16 and 2048 each is 1.38 times the one before, and padding sizes that
    are uniform in log m wastes about 15 % of the padded total.

    >>> buckets(16, 128, 4)
    (16, 32, 64, 128)
    """
    return tuple(sorted({round(size) for size in np.geomspace(smallest, largest, count)}))


def bucket_of(size: int, legal: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size` examples.

    >>> bucket_of(33, (16, 32, 64, 128))
    64
    """
    return next(bucket for bucket in legal if bucket >= size)


def pad(batch: Any, size: int) -> tuple[Any, np.ndarray]:
    """Pads every leaf's leading axis with zeros to `size`; the mask (size,) marks real examples."""
    count = len(jax.tree.leaves(batch)[0])

    def padded(leaf: Any) -> np.ndarray:
        result = np.zeros((size, *np.shape(leaf)[1:]), leaf.dtype)
        result[:count] = leaf
        return result

    return jax.tree.map(padded, batch), np.arange(size) < count
