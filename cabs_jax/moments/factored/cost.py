"""What the two ways to take a squared gradient norm cost, known from shapes alone.

For one example with groups k, positions t and outer products of p with q entries, after a backward
pass that cost t·p·q multiplications for this parameter's gradient anyway:

* the Gram form Σ_{s,t} ⟨left_s, left_t⟩⟨right_s, right_t⟩ adds t²·(p + q) multiplications;
* the direct form ‖Σ_t left_t ⊗ right_t‖² adds none, since its gradients add up to the batch's, but
  p·q numbers are written and read again, which costs as much as `TRAFFIC` multiplications each.
"""

from __future__ import annotations

TRAFFIC = 30
Sizes = tuple[int, int, int, int]


def prefers_direct(sizes: Sizes) -> bool:
    """Whether the direct form is cheaper than the Gram form, for (groups, positions, p, q).

    >>> prefers_direct((1, 196, 800, 64)), prefers_direct((1, 1, 3136, 1024))
    (True, False)
    """
    _, positions, p, q = sizes
    return positions > 1 and TRAFFIC * p * q <= positions**2 * (p + q)


def norm_bytes(sizes: Sizes, *, direct: bool) -> int:
    """Float32 bytes that one example needs while its norm is computed."""
    groups, positions, p, q = sizes
    return 4 * groups * (positions * (p + q) + (p * q if direct else 2 * positions**2))
