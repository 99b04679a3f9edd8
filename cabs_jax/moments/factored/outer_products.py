"""Squared norms, squares and sums of gradients that are sums of outer products.

Factors are as in `primitives`: left (examples, groups, positions, p), or one-hot indices (examples,
positions), and right (examples, groups, positions, q). All results are float32.

(1/m) Σ‖g_i‖² − ‖ḡ‖² = ξ cancels, so it matters how norms and mean are rounded. Let ε be the
relative error of a rounded operand (2⁻⁹ in bfloat16, 2⁻¹¹ in TF32), and g̃_i a gradient made of
rounded ones.

* Where ḡ is the mean of the very g̃_i whose norms are taken, the result is the variance of the g̃_i:
  not negative, and as the errors are independent of each other, off by about ε²·(1/m) Σ‖g_i‖².
* Where the norms are of the g_i and ḡ is of the g̃_i, it is off by 2⟨ḡ, ḡ̃ − ḡ⟩, up to 2ε‖ḡ‖²: where
  ξ ≪ ‖ḡ‖² nothing is left of it.

So contractions take a precision, which is the model's own where mean and norms round alike, and
the highest elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs, sharding
from cabs_jax.moments.factored.primitives import Factors
from cabs_jax.statistics import squared_norms

HIGHEST = lax.Precision.HIGHEST
Precision = lax.Precision | None


def _einsum(formula: str, *operands: jax.Array, precision: Precision = HIGHEST) -> jax.Array:
    dtypes = {x.dtype for x in operands}
    if len(dtypes) > 1 or dtypes == {jnp.dtype("float64")}:
        operands = tuple(x.astype(jnp.float32) for x in operands)
    return jnp.einsum(formula, *operands, precision=precision, preferred_element_type=jnp.float32)


def _square(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.asarray(x, jnp.float32))


def model_precision(equation: jaxprs.Equation) -> Precision:
    """The precision that a model asks for in a product; the highest for anything but a product."""
    if "precision" not in equation.params:
        return HIGHEST
    asked = equation.params["precision"]
    pair = asked if isinstance(asked, tuple) else (asked, asked)
    if not all(each is None or isinstance(each, lax.Precision) for each in pair):
        return HIGHEST
    known = [each for each in pair if each is not None]
    return max(known, key=lambda each: each.value) if known else None


def is_default(precision: Precision) -> bool:
    """Whether the backend may round the operands of a product as it likes."""
    return precision in (None, lax.Precision.DEFAULT)


def rounded(factors: Factors) -> Factors:
    """Factors as a contraction at default precision on a TPU sees them, in bfloat16 numbers."""
    left, right = factors
    return lax.reduce_precision(left, 8, 7), lax.reduce_precision(right, 8, 7)


def gradients(factors: Factors, rows: int, precision: Precision = HIGHEST) -> jax.Array:
    """Per-example gradients (examples, groups, p, q): Σ_t left_t ⊗ right_t."""
    left, right = factors
    if _is_indices(left):  # (b, t): row number left[b, t] gains right[b, 0, t]
        empty = jnp.zeros((rows, right.shape[-1]), jnp.float32)
        empty = sharding.vary(empty, tuple(jaxprs.varying_axes(right)))
        scatter: Any = jax.vmap(lambda at, row: empty.at[at].add(row))
        tables: jax.Array = scatter(left, right[:, 0].astype(jnp.float32))
        return tables[:, None]
    if left.shape[2] == 1:
        return left[:, :, 0, :, None].astype(jnp.float32) * right[:, :, 0, None, :].astype(
            jnp.float32
        )
    return _einsum("bktp,bktq->bkpq", left, right, precision=precision)


def gram_norms(uses: Sequence[Factors], precision: Precision = HIGHEST) -> jax.Array:
    """Squared norms (examples,) of Σ over uses, without forming a gradient."""
    if len(uses) == 1 and uses[0][1].shape[2] == 1:  # ‖left ⊗ right‖² = ‖left‖²·‖right‖²
        left, right = uses[0]
        across = squared_norms(right, 2)
        if not _is_indices(left):
            across = across * squared_norms(left, 2)
        return jnp.sum(across, axis=1)
    # ‖Σ_t left_t ⊗ right_t‖² = Σ_{s,t} ⟨left_s, left_t⟩⟨right_s, right_t⟩, s and t over all uses.
    total = jnp.zeros((), jnp.float32)
    for i, (left, right) in enumerate(uses):
        for j, (other_left, other_right) in enumerate(uses[: i + 1]):
            across = _einsum("bksq,bktq->bkst", right, other_right, precision=precision)
            inner = _overlaps(left, other_left, precision) * across
            total = total + (1.0 if i == j else 2.0) * jnp.sum(inner, axis=(1, 2, 3))
    return total


def _overlaps(left: jax.Array, other: jax.Array, precision: Precision) -> jax.Array:
    """Inner products (examples, groups, positions, positions) of left factors."""
    if _is_indices(left) and _is_indices(other):
        # One-hot vectors have the product 1 where they are the same, else 0.
        return (left[:, None, :, None] == other[:, None, None, :]).astype(jnp.float32)
    if _is_indices(left):
        # The product with a one-hot vector is an entry: (b, t, p) at (b, 1, s) gives (b, t, s).
        taken = jnp.take_along_axis(other[:, 0], left[:, None, :], axis=2)
        return taken.swapaxes(1, 2)[:, None].astype(jnp.float32)
    if _is_indices(other):
        return _overlaps(other, left, precision).swapaxes(2, 3)
    return _einsum("bksp,bktp->bkst", left, other, precision=precision)


def square_sums(factors: Factors) -> jax.Array:
    """Σ_i g_i² (groups, p, q) for a single position per example."""
    left, right = factors
    return _einsum("bktp,bktq->kpq", _square(left), _square(right))


def one_hot_norms(factors: Factors, *, apart: bool, by_sorting: bool = False) -> jax.Array:
    """Squared norms (examples,) of rows put to places; with `apart`, no two to the same."""
    if apart:
        return squared_norms(factors[1], 1)
    if by_sorting:
        return squared_norms(gradients(_renumbered(factors), factors[0].shape[1]), 1)
    return gram_norms([factors])


def _renumbered(factors: Factors) -> Factors:
    """Rows put to as few places as there are different ones, numbered from 0 in their order."""

    def numbers(left: jax.Array) -> jax.Array:
        # Place and position in one number: these sort three times as fast as pairs.
        count = left.shape[0]
        both = jnp.sort(left * count + jnp.arange(count, dtype=left.dtype))
        ordered, order = both // count, both % count
        is_new = jnp.diff(ordered, prepend=ordered[:1]) != 0
        number = jnp.cumsum(is_new, dtype=left.dtype)
        return jnp.zeros_like(left).at[order].set(number, unique_indices=True)

    return jax.vmap(numbers)(factors[0]), factors[1]


def narrowed(factors: Factors) -> tuple[Factors, jax.Array]:
    """Takes one vector out of rows that are all multiples of it.

    Returns:
      The factors with the multiples, (examples, groups, positions, 1), in place of the rows; and
      the vectors, (examples, groups, 1, q), of length 1: no norm changes.
    """
    left, right = factors[0], factors[1].astype(jnp.float32)
    # The longest row shows the direction best. Scaled, its square neither over- nor underflows.
    sizes = jnp.max(jnp.abs(right), axis=3, keepdims=True)
    at = jnp.argmax(sizes, axis=2, keepdims=True)
    row, size = (jnp.take_along_axis(x, at, axis=2) for x in (right, sizes))
    row = jnp.where(size > 0, row / size, 0.0)
    vector = row / jnp.sqrt(jnp.maximum(jnp.sum(_square(row), axis=3, keepdims=True), 1.0))
    return (left, jnp.sum(right * vector, axis=3, keepdims=True)), vector


def weighted_norms(factors: Factors, scale: jax.Array) -> jax.Array:
    """Squared norms (examples,) of scale · (left ⊗ right), for a single position per example."""
    left, right = (_square(factor[:, :, 0]) for factor in factors)
    along_left = _einsum("bkp,kpq->bkq", left, _square(scale))
    return jnp.sum(along_left * right, axis=(1, 2))


def one_hot_square_sums(
    factors: Factors, rows: int, *, apart: bool, by_sorting: bool = False
) -> jax.Array:
    """Σ_i g_i² (1, rows, q) of gradients that are rows of `right` put to the places in `left`.

    Rows of one example that go to one place are added up before they are squared, where the first
    of them stands. With `apart`, no two do.
    """
    left, right = _added_up(factors, apart=apart, by_sorting=by_sorting)
    return _squares_at(left, right, rows)


def pooled_square_sums(
    factors: Factors, rows: int, *, in_table: bool, by_sorting: bool = False
) -> jax.Array:
    """The same of rows that are all multiples of one vector for each example.

    With `in_table`, the multiples are put to places in a table for each example.
    """
    multiples, vector = narrowed(factors)
    if in_table:
        tables = gradients(multiples, rows)[:, 0]  # (b, rows, 1)
        return _einsum("bpo,btq->pq", _square(tables), _square(vector[:, 0]))[None]
    left, sums = _added_up(multiples, apart=False, by_sorting=by_sorting)
    return _squares_at(left, sums * vector[:, 0], rows)


def _added_up(factors: Factors, *, apart: bool, by_sorting: bool) -> Factors:
    """Places (b, t) and rows (b, t, q) of which no two that are not zero go to one place."""
    left, right = factors[0], factors[1][:, 0].astype(jnp.float32)  # (b, t) and (b, t, q)
    if by_sorting and not apart:
        places, _ = _renumbered(factors)
        right = gradients((places, factors[1]), left.shape[1])[:, 0]
        # Numbers that are not given out are of rows that are zero.
        left = jax.vmap(lambda at, row: jnp.zeros_like(row).at[at].set(row))(places, left)
    elif not apart:
        same = left[:, :, None] == left[:, None, :]
        first = ~jnp.any(jnp.tril(same, -1), axis=2)
        sums = _einsum("bts,bsq->btq", same.astype(jnp.float32), right)
        right = jnp.where(first[:, :, None], sums, 0.0)
    return left, right


def _squares_at(left: jax.Array, right: jax.Array, rows: int) -> jax.Array:
    """The squares (1, rows, q) of rows (b, t, q), added up at their places (b, t)."""
    empty = sharding.vary(jnp.zeros((rows, right.shape[2])), tuple(jaxprs.varying_axes(right)))
    squares: jax.Array = empty.at[left.reshape(-1)].add(_square(right).reshape(left.size, -1))
    return squares[None]


def _is_indices(left: jax.Array) -> bool:
    return bool(jnp.issubdtype(left.dtype, jnp.integer))
