"""What the forms of a squared gradient norm cost, known from shapes alone.

For one example with groups k, positions t and outer products of p with q entries, after a backward
pass that cost t·p·q multiplications for this weight's gradient anyway:

* the Gram form Σ_{s,t} ⟨left_s, left_t⟩⟨right_s, right_t⟩ adds t²·(p + q) multiplications;
* the direct form ‖Σ_t left_t ⊗ right_t‖² adds none, since its gradients add up to the batch's, but
  p·q numbers are written and read again, which costs as much as `TRAFFIC` multiplications each.
"""

from __future__ import annotations

import jax

TRAFFIC = 30
BLOCK_BYTES = {"cpu": 4 * 2**20}
BLOCK_BYTES_ELSEWHERE = 256 * 2**20


def prefers_direct(sizes: tuple[int, int, int, int]) -> bool:
    """Whether the direct form is cheaper than the Gram form, for (groups, positions, p, q).

    >>> prefers_direct((1, 196, 800, 64)), prefers_direct((1, 1, 3136, 1024))
    (True, False)
    """
    _, positions, p, q = sizes
    return positions > 1 and TRAFFIC * p * q <= positions**2 * (p + q)


def norm_bytes(sizes: tuple[int, int, int, int], *, direct: bool) -> int:
    """Float32 bytes that one example needs while its norm is computed."""
    groups, positions, p, q = sizes
    return 4 * groups * (positions * (p + q) + (p * q if direct else 2 * positions**2))


def blocks(examples: int, bytes_per_example: int, unit: int = 1) -> tuple[int, int]:
    """Splits a batch into blocks whose intermediate results stay in cache.

    Args:
      examples: Size of the batch, a multiple of `unit`.
      bytes_per_example: What one example needs.
      unit: What the size of a block must be a multiple of.

    Returns:
      The block's size and the number of blocks; together they hold the batch or a little more.
    """
    backend = jax.default_backend()
    budget = BLOCK_BYTES.get(backend, BLOCK_BYTES_ELSEWHERE)
    largest = max(budget // max(bytes_per_example, 1) // unit, 1) * unit
    count = -(-examples // largest)
    for number in range(count, min(2 * count, examples) + 1):
        if examples % number == 0 and (examples // number) % unit == 0:
            return examples // number, number
    return -(-examples // (count * unit)) * unit, count
