"""The one loop over blocks of a batch.

It bounds memory (`microbatch_size`), makes the groups of the between-group estimate, and keeps what
a per-example norm is computed from in cache. As in `optax.microbatching`, what is summed is carried
from block to block and what belongs to an example is written to its place.

A block takes its examples from the whole length of the batch where the batch may be split over
devices: with `lanes` devices the batch is seen as (lanes, blocks, rows), and block number k is
[:, k, :], to which every device gives an equal part of its own examples. Within a lane the order is
kept, so that padding, which stands at the end, fills the last blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs, sharding
from cabs_jax.moments.target import Target
from cabs_jax.statistics import PyTree

OfBlock = Callable[[PyTree], tuple[PyTree, PyTree]]


def over_blocks(
    function: OfBlock,
    examples: PyTree,
    size: int,
    *,
    lanes: int = 1,
    keep: jax.Array | None = None,
) -> tuple[PyTree, PyTree]:
    """Applies `function(examples) -> (sums, rows)` to a batch, block by block.

    Args:
      function: Returns what is to be added up over the blocks, and what is to be kept for every
        example, arrays with a leading example axis; or for every block, with a leading axis of 1.
      examples: Arrays with a leading axis of m examples.
      size: Examples in a block; it divides m.
      lanes: Number of devices over which the batch may be split without our knowing. Where it does
        not divide `size` as well as m, the blocks are cut from the batch one after another.
      keep: Boolean, shape (m,): blocks at the end that hold no True are skipped, and their rows
        are zero.

    Returns:
      The sums, and the rows in the order of the examples, or of the blocks.
    """
    leaves = jax.tree.leaves(examples)
    total = leaves[0].shape[0]
    if size == total:
        return function(examples)
    count, lanes = total // size, 1 if size % lanes or total % lanes else lanes
    axis_names = tuple(frozenset[str]().union(*map(jaxprs.varying_axes, leaves)))

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(lanes, count, size // lanes, *x.shape[1:])  # (m, ...) to (l, k, r, ...)

    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        block = lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)
        return jnp.reshape(block, (size, *block.shape[2:]))  # (l, r, ...) to (l·r, ...)

    def put(x: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
        block = rows.reshape(x.shape[0], *x.shape[2:])
        updated: jax.Array = lax.dynamic_update_index_in_dim(x, block, index, axis=1)
        return updated

    def empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        zeros: jax.Array = sharding.vary(jnp.zeros(shape, dtype), axis_names)
        return zeros

    def empty_rows(rows: jax.ShapeDtypeStruct) -> jax.Array:
        parts = lanes if rows.shape[0] == size else 1
        return empty((parts, count, rows.shape[0] // parts, *rows.shape[1:]), rows.dtype)

    blocks = jax.tree.map(cut, examples)

    def of_block(index: jax.Array) -> tuple[PyTree, PyTree]:
        return function(jax.tree.map(lambda x: take(x, index), blocks))

    def step(index: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        (sums, rows), (more, new) = carry, of_block(index)
        rows = jax.tree.map(lambda x, r: put(x, r, index), rows, new)
        return jax.tree.map(jnp.add, sums, more), rows

    sums, rows = jax.eval_shape(of_block, jnp.zeros((), jnp.int32))
    start = (
        jax.tree.map(lambda s: empty(s.shape, s.dtype), sums),
        jax.tree.map(empty_rows, rows),
    )
    stop: int | jax.Array = count
    if keep is not None:
        occupied = jnp.any(cut(keep), axis=(0, 2))  # (l, k, r) to (k,)
        stop = jnp.max(jnp.where(occupied, jnp.arange(1, count + 1), 0))
    sums, rows = lax.fori_loop(0, stop, step, start)
    return sums, jax.tree.map(lambda r: r.reshape(math.prod(r.shape[:3]), *r.shape[3:]), rows)


def sum_in_cache(
    function: OfBlock, examples: PyTree, bytes_per_example: int, target: Target
) -> tuple[PyTree, PyTree]:
    """Applies `function(examples) -> (summands, rows)` in blocks that stay in cache.

    Where the batch may be split over devices, each device's sums are kept apart until the end, so
    that no block waits for a reduction over devices.

    Args:
      function: Returns arrays to be summed over examples and arrays to be kept, all with a leading
        example axis. The summands of examples that are all zero must be zero.
      examples: Arrays with a leading example axis.
      bytes_per_example: What the function needs for one example.
      target: The machine, and how the batch lies on it.

    Returns:
      The sums, and the rows in the order of the examples.
    """
    total = jax.tree.leaves(examples)[0].shape[0]
    lanes = 1 if total % target.lanes else target.lanes
    size, count = fitting(total, bytes_per_example, target.budget(lanes), lanes)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, size * count - total), *((0, 0),) * (x.ndim - 1)))

    def of_block(examples: PyTree) -> tuple[PyTree, PyTree]:
        summands, rows = function(examples)

        def by_lane(x: jax.Array) -> jax.Array:
            return jnp.sum(x.reshape(lanes, size // lanes, *x.shape[1:]), axis=1)

        return jax.tree.map(by_lane, summands), rows

    fills = size * count == total
    whole = examples if fills else jax.tree.map(padded, examples)
    sums, rows = over_blocks(of_block, whole, size, lanes=lanes)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    return sums, rows if fills else jax.tree.map(lambda r: r[:total], rows)


def fitting(examples: int, bytes_per_example: int, budget: int, unit: int = 1) -> tuple[int, int]:
    """Splits a batch into blocks whose intermediate results stay in cache.

    Args:
      examples: Size of the batch, a multiple of `unit`.
      bytes_per_example: What one example needs.
      budget: What a block may need.
      unit: What the size of a block must be a multiple of.

    Returns:
      The block's size and the number of blocks; together they hold the batch or a little more.
    """
    largest = max(budget // max(bytes_per_example, 1) // unit, 1) * unit
    count = -(-examples // largest)
    # A few more blocks than needed, if these divide the batch, spare the padding.
    for number in range(count, min(2 * count, examples) + 1):
        if examples % number == 0 and (examples // number) % unit == 0:
            return examples // number, number
    return -(-examples // (count * unit)) * unit, count
