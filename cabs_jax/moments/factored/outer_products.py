"""Squared norms, squares and sums of gradients that are sums of outer products.

Factors are as in `primitives`: left (examples, groups, positions, p), or one-hot indices (examples,
positions), and right (examples, groups, positions, q). All results are float32, all contractions
ask for the highest precision: (1/m) Σ‖g‖² − ‖ḡ‖² cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs, sharding
from cabs_jax.moments.factored import cost
from cabs_jax.moments.factored.primitives import Factors

PyTree = Any


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    dtypes = {x.dtype for x in operands}
    if len(dtypes) > 1 or dtypes == {jnp.dtype("float64")}:
        operands = tuple(x.astype(jnp.float32) for x in operands)
    return jnp.einsum(
        formula, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _square(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.asarray(x, jnp.float32))


def gradients(factors: Factors, rows: int) -> jax.Array:
    """Per-example gradients (examples, groups, p, q): Σ_t left_t ⊗ right_t."""
    left, right = factors
    if _is_indices(left):
        empty = jnp.zeros((rows, right.shape[-1]), jnp.float32)
        empty = sharding.vary(empty, tuple(jaxprs.varying_axes(right)))
        scatter: Any = jax.vmap(lambda at, row: empty.at[at].add(row))
        tables: jax.Array = scatter(left, right[:, 0].astype(jnp.float32))
        return tables[:, None]
    if left.shape[2] == 1:
        return left[:, :, 0, :, None].astype(jnp.float32) * right[:, :, 0, None, :].astype(
            jnp.float32
        )
    return _einsum("bktp,bktq->bkpq", left, right)


def gram_norms(uses: Sequence[Factors]) -> jax.Array:
    """Squared norms (examples,) of Σ over uses, without forming a gradient."""
    if len(uses) == 1 and uses[0][1].shape[2] == 1:
        left, right = uses[0]
        across = jnp.sum(_square(right), axis=(2, 3))
        if not _is_indices(left):
            across = across * jnp.sum(_square(left), axis=(2, 3))
        return jnp.sum(across, axis=1)
    total = jnp.zeros((), jnp.float32)
    for i, (left, right) in enumerate(uses):
        for j, (other_left, other_right) in enumerate(uses[: i + 1]):
            inner = _overlaps(left, other_left) * _einsum("bksq,bktq->bkst", right, other_right)
            total = total + (1.0 if i == j else 2.0) * jnp.sum(inner, axis=(1, 2, 3))
    return total


def _overlaps(left: jax.Array, other: jax.Array) -> jax.Array:
    """Inner products (examples, groups, positions, positions) of left factors."""
    if _is_indices(left) and _is_indices(other):
        return (left[:, None, :, None] == other[:, None, None, :]).astype(jnp.float32)
    if _is_indices(left):
        taken = jnp.take_along_axis(other[:, 0], left[:, None, :], axis=2)
        return taken.swapaxes(1, 2)[:, None].astype(jnp.float32)
    if _is_indices(other):
        return _overlaps(other, left).swapaxes(2, 3)
    return _einsum("bksp,bktp->bkst", left, other)


def square_sums(factors: Factors) -> jax.Array:
    """Σ_i g_i² (groups, p, q) for a single position per example."""
    left, right = factors
    return _einsum("bktp,bktq->kpq", _square(left), _square(right))


def over_blocks(
    function: Callable[[PyTree], tuple[PyTree, PyTree]], operands: PyTree, bytes_per_example: int
) -> tuple[PyTree, PyTree]:
    """Applies `function(operands) -> (summands, rows)` to a batch, block by block.

    Where the batch may be split over devices, each device's sums are kept apart until the end, so
    that no block waits for a reduction over devices.

    Args:
      function: Returns arrays to be summed over examples and arrays to be kept, all with a leading
        example axis. The summands of examples that are all zero must be zero.
      operands: Arrays with a leading example axis.
      bytes_per_example: What the function needs for one example.

    Returns:
      The sums, and the rows in the order of the operands.
    """
    leaves = jax.tree.leaves(operands)
    examples, axes = leaves[0].shape[0], tuple(jaxprs.varying_axes(leaves[0]))
    devices = jax.device_count()
    lanes = devices if not axes and examples % devices == 0 else 1
    size, count = cost.blocks(examples, bytes_per_example, lanes)

    def add_up(summands: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jnp.sum(x.reshape(lanes, size // lanes, *x.shape[1:]), axis=1), summands
        )

    def across(sums: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    if count == 1:
        summands, rows = function(operands)
        return across(add_up(summands)), rows

    def strided(x: jax.Array) -> jax.Array:
        padding = ((0, size * count - examples), *((0, 0),) * (x.ndim - 1))
        padded = jnp.pad(x, padding) if size * count > examples else x
        return padded.reshape(size, count, *x.shape[1:])

    operands = jax.tree.map(strided, operands)

    def block(index: jax.Array) -> tuple[PyTree, PyTree]:
        taken = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), operands
        )
        summands, rows = function(taken)
        return add_up(summands), rows

    def step(sums: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
        more, rows = block(index)
        return jax.tree.map(jnp.add, sums, more), rows

    shapes, _ = jax.eval_shape(block, jnp.zeros((), jnp.int32))
    start = jax.tree.map(lambda s: sharding.vary(jnp.zeros(s.shape, s.dtype), axes), shapes)
    sums, rows = lax.scan(step, start, jnp.arange(count))
    ordered = jax.tree.map(
        lambda r: r.swapaxes(0, 1).reshape(size * count, *r.shape[2:])[:examples], rows
    )
    return across(sums), ordered


def _is_indices(left: jax.Array) -> bool:
    return bool(jnp.issubdtype(left.dtype, jnp.integer))
