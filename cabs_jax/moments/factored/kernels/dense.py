"""The weight gradient of a dense layer, with the norm of each example's part of it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cabs_jax.moments import jaxprs

LANES, SUBLANES = 128, 16  # arrays in VMEM are stored in whole tiles of these sizes
LARGEST = (256, 512, 1024)  # positions, rows and columns of a product
READ_BYTES = 2**20  # of one operand in VMEM
UNROLLED = 512  # passes through the matrix unit in one piece of straight code
SMALLEST_LIMIT = 16 * 2**20  # bytes of VMEM, as the compiler grants by itself
FUSE_TRANSPOSE = "fuse_transposed_lhs_in_matmul"  # a hint, which jax 0.9.0 cannot give
HINTS: dict[str, Any] = (
    {FUSE_TRANSPOSE: True} if hasattr(pltpu.CompilerParams, FUSE_TRANSPOSE) else {}
)


class Tiles(NamedTuple):
    """How a weight gradient is cut, for some examples at a time.

    Attributes:
      positions: Positions in one product.
      p: Rows of the gradient in one tile.
      q: Columns.
      examples: Examples whose factors are read at once.
    """

    positions: int
    p: int
    q: int
    examples: int


def tiles(examples: int, positions: int, p: int, q: int) -> Tiles:
    """Cuts a weight gradient into tiles that fit in VMEM.

    >>> tiles(64, 64, 784, 512), tiles(8, 2048, 2048, 8192)
    (Tiles(positions=64, p=512, q=512, examples=8),
     Tiles(positions=256, p=512, q=1024, examples=1))
    """
    units = SUBLANES, LANES, LANES
    part, tile_p, tile_q = map(_part, (positions, p, q), LARGEST, units)
    nbytes = 4 * part * whole(max(tile_p, tile_q), LANES)
    at_once = divisor(examples, READ_BYTES // nbytes) if part == positions else 1
    return Tiles(part, tile_p, tile_q, at_once)


def weight_gradient(
    left: jax.Array,
    right: jax.Array,
    precision: lax.Precision | None,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """Sum over examples of Σ_t left_t ⊗ right_t, and the squared norm of each summand.

    For every tile of the gradient the examples are gone through one after another: the product of
    an example's two factors is made in VMEM, where it is added to the sum and squared. What is
    read are the factors, once if the gradient is a single tile; what is written is the sum.

    Args:
      left: Factors of shape (examples, groups, positions, p), float32 or bfloat16.
      right: The same with q.
      precision: Of the products.
      interpret: Whether, or with what checks, to run on any machine, slowly.

    Returns:
      The sum, float32, shape (groups, p, q), and the norms, float32, shape (examples,).

    Example:
      >>> import jax.numpy as jnp
      >>> left, right = jnp.ones((2, 1, 3, 2)), jnp.ones((2, 1, 3, 1))
      >>> total, norms = weight_gradient(left, right, None, interpret=True)
      >>> total.tolist(), norms.tolist()
      ([[[6.0], [6.0]]], [18.0, 18.0])
    """
    (examples, groups, positions, p), q = left.shape, right.shape[-1]
    if left.dtype != right.dtype:
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    cut = tiles(examples, positions, p, q)
    down, across, parts = -(-p // cut.p), -(-q // cut.q), -(-positions // cut.positions)
    shaped = functools.partial(jaxprs.shape_varying_like, operands=(left, right))
    total, norms = pl.pallas_call(
        functools.partial(_tile_kernel, (positions, p, q), cut, precision),
        grid=(groups, down, across, examples // cut.examples, parts),
        in_specs=[
            pl.BlockSpec(
                (cut.examples, None, cut.positions, cut.p), lambda k, i, j, e, s: (e, k, s, i)
            ),
            pl.BlockSpec(
                (cut.examples, None, cut.positions, cut.q), lambda k, i, j, e, s: (e, k, s, j)
            ),
        ],
        out_specs=[
            pl.BlockSpec((None, cut.p, cut.q), lambda k, i, j, e, s: (k, i, j)),
            pl.BlockSpec(
                (None, 1, examples),
                lambda k, i, j, e, s: ((k * down + i) * across + j, 0, 0),
                memory_space=pltpu.SMEM,
            ),
        ],
        out_shape=[
            shaped((groups, p, q), jnp.float32),
            shaped((groups * down * across, 1, examples), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((cut.p, cut.q), jnp.float32)] if parts > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2,
            vmem_limit_bytes=vmem_limit(4 * READ_BYTES + 3 * 4 * cut.p * cut.q),
            **HINTS,
        ),
        **costs(
            products=2 * left.size * q,
            elementwise=3 * examples * groups * p * q,
            nbytes=across * left.nbytes + down * right.nbytes + 4 * groups * p * q,
        ),
        interpret=interpret,
        name="weight_gradient",
    )(left, right)
    return total, jnp.sum(norms, axis=(0, 1))


def _tile_kernel(
    sizes: tuple[int, int, int],
    cut: Tiles,
    precision: lax.Precision | None,
    left: Any,
    right: Any,
    total: Any,
    norms: Any,
    *scratch: Any,
) -> None:
    """One tile of the gradient, for some examples: adds to the tile and writes their norms."""
    (positions, p, q), (first, part) = sizes, (pl.program_id(3), pl.program_id(4))
    row, column = pl.program_id(1) * cut.p, pl.program_id(2) * cut.q
    last = -(-positions // cut.positions) - 1

    sides = (left, row, p), (right, column, q)

    @pl.when((first == 0) & (part == 0))
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    def product(e: jax.Array) -> jax.Array:
        start = part * cut.positions
        a, b = (_within(_within(x[e], 0, start, positions), 1, at, size) for x, at, size in sides)
        over_positions = (((0,), (0,)), ((), ()))
        return lax.dot_general(
            a, b, over_positions, precision=precision, preferred_element_type=jnp.float32
        )

    def add(e: jax.Array, g: jax.Array) -> None:
        total[...] += g
        norms[0, first * cut.examples + e] = jnp.sum(g * g)

    def of_example(e: jax.Array, carry: None) -> None:
        if last == 0:
            add(e, product(e))
            return
        (g,) = scratch

        @pl.when(part == 0)
        def begin() -> None:
            g[...] = product(e)

        @pl.when(part > 0)
        def go_on() -> None:
            g[...] += product(e)

        @pl.when(part == last)
        def end() -> None:
            add(e, g[...])

    unroll = divisor(cut.examples, UNROLLED // passes(cut.p, cut.q, cut.positions))
    lax.fori_loop(0, cut.examples, of_example, None, unroll=unroll)


def _within(x: jax.Array, axis: int, start: jax.Array, size: int) -> jax.Array:
    """Zeros for what a block that starts somewhere in an array has beyond the array's end."""
    if size % x.shape[axis] == 0:
        return x
    place = start + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(place < size, x, jnp.zeros((), x.dtype))


def vmem_limit(nbytes: int) -> int:
    """How much VMEM to reserve for buffers of so many bytes and what a product adds.

    The compiler keeps as much less of its own there.
    """
    return max(2 * nbytes, SMALLEST_LIMIT)


def costs(products: int, elementwise: int, nbytes: int) -> dict[str, Any]:
    """What a kernel does, for the compiler that schedules it and for who reads what it compiles."""
    return {
        "cost_estimate": pl.CostEstimate(products + elementwise, 0, nbytes),
        "metadata": {
            "products": str(products),
            "elementwise": str(elementwise),
            "memory": str(nbytes),
        },
    }


def passes(p: int, q: int, positions: int) -> int:
    """How often rows are sent through the matrix unit for a product over positions."""
    return -(-p // 8) * -(-q // LANES) * -(-positions // LANES)


def _part(size: int, largest: int, unit: int) -> int:
    """The size of the parts when a size is cut evenly, in whole units, into as few as can be."""
    parts = -(-size // largest)
    return size if parts == 1 else whole(-(-size // parts), unit)


def whole(size: int, unit: int) -> int:
    """A size rounded up to whole units."""
    return -(-size // unit) * unit


def divisor(number: int, largest: int) -> int:
    """The largest divisor of a number that is at most `largest`, or 1."""
    return max(d for d in range(1, max(min(number, largest), 1) + 1) if number % d == 0)
