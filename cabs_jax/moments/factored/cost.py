"""What the two ways to take a squared gradient norm cost, known from shapes and the target alone.

For one example with groups k, positions t and outer products of p with q entries, after a backward
pass that cost t·p·q multiplications for this parameter's gradient anyway:

* the Gram form Σ_{s,t} ⟨left_s, left_t⟩⟨right_s, right_t⟩ adds t²·(p + q) multiplications, or
  t²·q where the left factors are one-hot, whose products are comparisons;
* the direct form ‖Σ_t left_t ⊗ right_t‖² adds none, since its gradients add up to the batch's, but
  p·q numbers are written and read again, which costs as much as `traffic` multiplications each;
  in a kernel (see `kernels`) as much as `KERNEL_TRAFFIC`, for they stay near the matrix unit.

Where the left factors are one-hot, the rows of `right` that go to one place can also be brought
together by sorting. That grows no faster than t·log t, and pays where t is large and p larger.
"""

from __future__ import annotations

from cabs_jax.moments.target import Target

Sizes = tuple[int, int, int, int]
KERNEL_TRAFFIC = 32  # on a TPU: short products fill its matrix unit badly


def prefers_direct(
    sizes: Sizes,
    target: Target,
    *,
    rounded: bool = False,
    one_hot: bool = False,
    patches: bool = False,
) -> bool:
    """Whether the direct form is cheaper than the Gram form.

    Args:
      sizes: (groups, positions, p, q).
      target: The machine.
      rounded: Whether the products of the Gram form are of rounded or 16-bit numbers.
      one_hot: Whether the left factors are one-hot.
      patches: Whether they are patches that the Gram form must lay out, and the direct form not.

    >>> cpu, tpu = Target("cpu"), Target("tpu")
    >>> prefers_direct((1, 196, 800, 64), cpu), prefers_direct((1, 1, 3136, 1024), cpu)
    (True, False)
    >>> [prefers_direct((1, 128, 1024, 1024), machine) for machine in (cpu, tpu)]
    [True, False]
    """
    _, positions, p, q = sizes
    costs = target.costs
    traffic = costs.rounded_traffic if rounded else costs.traffic
    across = q if one_hot else p + q
    laid_out = costs.patch_traffic * positions * p if patches else 0
    return positions > 1 and traffic * p * q <= positions**2 * across + laid_out


def prefers_kernel(sizes: Sizes) -> bool:
    """Whether a kernel is cheaper than the Gram form; than the direct form it always is.

    >>> prefers_kernel((1, 64, 128, 512)), prefers_kernel((1, 4, 512, 512))
    (True, False)
    """
    _, positions, p, q = sizes
    return positions > 1 and KERNEL_TRAFFIC * p * q <= positions**2 * (p + q)


def prefers_sorting(sizes: Sizes, target: Target) -> bool:
    """Whether rows that go to one place, the left factors being one-hot, are best found by sorting.

    >>> [prefers_sorting((1, 256, p, 64), Target("cpu")) for p in (256, 8192)]
    [False, True]
    """
    _, positions, p, _ = sizes
    least = target.costs.sorts_from
    sortable = p * positions < 2**31  # as 32-bit numbers
    return least is not None and positions >= least and p > 2 * positions and sortable


def norm_bytes(sizes: Sizes, *, direct: bool, one_hot: bool = False) -> int:
    """Float32 bytes that one example needs while its norm is computed.

    Args:
      sizes: (groups, positions, p, q).
      direct: Whether the norm is taken of a gradient, not by its Gram form.
      one_hot: Whether the left factors are one-hot, which are given as indices.

    >>> norm_bytes((1, 32, 8192, 64), direct=False, one_hot=True)
    16512
    """
    groups, positions, p, q = sizes
    factors = positions * ((1 if one_hot else p) + q)
    return 4 * groups * (factors + (p * q if direct else 2 * positions**2))


def sorting_bytes(sizes: Sizes) -> int:
    """Float32 bytes that one example needs while rows that go to one place are added up."""
    groups, positions, _, q = sizes
    return norm_bytes((groups, positions, positions, q), direct=True, one_hot=True)
