"""One rule per primitive: how a parameter's gradient follows from its input and output cotangent.

Where a parameter w meets an example in an equation y = f(w, x) that is linear in w, the gradient of
one example is a sum of outer products over positions t,

    g[k, p, q] = Σ_t  left[k, t, p] · right[k, t, q],

with `left` made of x, `right` made of the cotangent of y, and k running over groups that do not mix
(batch dimensions, feature groups). The rest of the package needs no more than that.

To teach it a primitive:

1. Write `def _rule(equation, operand) -> Rule | None`. `operand` says which input is the
   parameter. Return None for a case that the rule does not cover: it is then differentiated example
   by example.
2. In the `Rule`, give the shape to which the parameter is to be reshaped so that every axis belongs
   wholly to the groups, to `left` or to `right`; which axes those are, in the order in which they
   are flattened; and the number of positions.
3. Give `factors(x, cotangent)`. Both arrive with a leading axis of examples, and in the layout of
   the equation. Return `left` of shape (examples, groups, positions, p) and `right` likewise with
   q. If `left` would be one-hot, return the indices, an integer array (examples, positions).
4. Enter it in `RULES` and add a case to the zoo in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from cabs_jax.moments import convolution, jaxprs

Factors = tuple[jax.Array, jax.Array]


class Rule(NamedTuple):
    """How the gradient of a parameter is made of outer products.

    Attributes:
      operand: Which operand of the equation is the parameter.
      shape: Shape of the parameter, its axes split where one belongs to two of the following.
      groups: Axes of that shape which stay apart.
      left: Axes that come from the input.
      right: Axes that come from the cotangent of the output.
      positions: Number of outer products summed per example.
      factors: `(x, cotangent) -> (left, right)`, all with a leading axis of examples; x is the
        other operand, or a tuple of them where there are several.
      one_hot: Whether `left` is given as indices.
      apart: Whether no two positions of an example have the same `left`, so that entries of the
        gradient are entries of `right`.
      rows: If `left` is given as indices, the axes of the output that positions run along.
      pooled: Whether all positions are added up, each times a number. Then what `right` gives for
        each is one vector times that number.
    """

    operand: int
    shape: tuple[int, ...]
    groups: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    positions: int
    factors: Callable[[Any, jax.Array], Factors]
    one_hot: bool = False
    apart: bool = False
    rows: tuple[int, ...] = ()
    pooled: bool = False

    def sizes(self) -> tuple[int, int, int, int]:
        """Returns the numbers (groups, positions, p, q)."""
        count = [math.prod(self.shape[a] for a in axes) for axes in self[2:5]]
        return count[0], self.positions, count[1], count[2]

    def sizes_of_norms(self) -> tuple[int, int, int, int]:
        """Returns these numbers for the factors of which norms are taken (see `outer_products`)."""
        groups, positions, p, q = self.sizes()
        return groups, positions, p, 1 if self.pooled else q

    def lay_out(self, x: jax.Array) -> jax.Array:
        """Brings an array like the parameter into the shape (groups, p, q)."""
        groups, _, p, q = self.sizes()
        order = (*self.groups, *self.left, *self.right)
        return x.reshape(self.shape).transpose(order).reshape(groups, p, q)

    def assemble(self, gradient: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Lays a gradient of shape (..., groups, p, q) out like the parameter."""
        lead = gradient.ndim - 3
        order = (*self.groups, *self.left, *self.right)
        gradient = gradient.reshape(*gradient.shape[:lead], *(self.shape[a] for a in order))
        back = [lead + order.index(axis) for axis in range(len(order))]
        gradient = gradient.transpose(*range(lead), *back)
        return gradient.reshape(*gradient.shape[:lead], *shape)


def find_rule(equation: jaxprs.Equation, operand: int) -> Rule | None:
    """Returns the rule for a parameter at one operand of an equation, None if none covers it."""
    make = RULES.get(jaxprs.name(equation))
    real = jnp.issubdtype(equation.invars[operand].aval.dtype, jnp.floating)
    return make(equation, operand) if make and real else None


def picks(equation: jaxprs.Equation, rule: Rule) -> bool:
    """Whether an example is given a part of the parameter, each of its entries once and as it is.

    The norm of a gradient with respect to that part is then the norm of the parameter's.
    """
    dropping = equation.params.get("mode") == GatherScatterMode.FILL_OR_DROP
    return rule.one_hot and rule.apart and not dropping


def spread_along(equation: jaxprs.Equation) -> frozenset[int]:
    """The axes along which what a broadcast_in_dim puts out is the same."""
    (operand, *_), (output,) = equation.invars, equation.outvars
    kept = zip(equation.params["broadcast_dimensions"], operand.aval.shape, strict=True)
    return frozenset(range(output.aval.ndim)) - {axis for axis, size in kept if size > 1}


def rows_after(
    equation: jaxprs.Equation,
    place: int,
    rows: tuple[int, ...],
    differing: Sequence[frozenset[int]],
) -> tuple[int, ...] | None:
    """Follows rows through an equation that multiplies each by a number, or all by one vector.

    Args:
      equation: An equation.
      place: The place of an operand.
      rows: The axes along which its rows lie.
      differing: The axes along which each operand may differ.

    Returns:
      The axes along which they lie in the output; None where more than that is done.
    """
    match jaxprs.name(equation):
        case "transpose":
            order = list(equation.params["permutation"])
            return tuple(order.index(axis) for axis in rows)
        case "squeeze":
            gone = set(equation.params["dimensions"])
            kept = [axis for axis in range(equation.invars[0].aval.ndim) if axis not in gone]
            return tuple(kept.index(axis) for axis in rows if axis in kept)
        case "convert_element_type" | "neg":
            followed = True
        case "select_n":  # what it puts out besides has no gradient
            followed = place > 0 and differing[0] <= set(rows)
        case "mul" | "div" as name:
            other = differing[1 - place]
            linear = name == "mul" or place == 0
            followed = linear and (other <= set(rows) or other.isdisjoint(rows))
        case _:
            followed = False
    return rows if followed else None


def adds_rows(equation: jaxprs.Equation, place: int, rows: tuple[int, ...]) -> bool:
    """Whether the rows of an operand are added up, as they are or each times a number."""
    if jaxprs.name(equation) == "reduce_sum":
        return set(equation.params["axes"]) == set(rows)
    rule = find_rule(equation, place)
    if rule is None or rule.one_hot or rule.groups or rule.positions > 1:
        return False
    return set(rule.left) == set(rows)


def _dot_general(equation: jaxprs.Equation, operand: int) -> Rule | None:
    contracting, batching = equation.params["dimension_numbers"]
    w_contract, x_contract = contracting[operand], contracting[1 - operand]
    w_batch, x_batch = batching[operand], batching[1 - operand]
    w_shape = equation.invars[operand].aval.shape
    x_shape = equation.invars[1 - operand].aval.shape
    w_free = _others(len(w_shape), w_contract, w_batch)
    x_free = _others(len(x_shape), x_contract, x_batch)
    if not jnp.issubdtype(equation.invars[1 - operand].aval.dtype, jnp.floating):
        return None
    groups = math.prod(w_shape[a] for a in w_batch)
    positions = math.prod(x_shape[a] for a in x_free)
    p = math.prod(w_shape[a] for a in w_contract)
    q = math.prod(w_shape[a] for a in w_free)

    def factors(x: jax.Array, cotangent: jax.Array) -> Factors:
        # x becomes (b, groups, positions, p). A dot_general puts out its batch axes, then the free
        # axes of the first operand, then of the second: here (b, groups, positions, q), or
        # (b, groups, q, positions) where the parameter comes first.
        examples = x.shape[0]
        left = x.transpose(0, *(1 + a for a in (*x_batch, *x_free, *x_contract)))
        left = left.reshape(examples, groups, positions, p)
        if operand == 1:
            right = cotangent.reshape(examples, groups, positions, q)
        else:
            right = cotangent.reshape(examples, groups, q, positions).swapaxes(2, 3)
        return left, right

    return Rule(operand, w_shape, tuple(w_batch), tuple(w_contract), w_free, positions, factors)


def _conv_general_dilated(equation: jaxprs.Equation, operand: int) -> Rule | None:
    params = equation.params
    if operand != 1 or params["batch_group_count"] != 1:
        return None
    x_shape, w_shape = (v.aval.shape for v in equation.invars)
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    g = convolution.geometry(x_shape, w_shape, equation.outvars[0].aval.shape, params)
    kernel, positions = math.prod(g.kernel), g.batch * math.prod(g.output)
    features = rhs_spec[0]
    # The axis of output features is split in two: its groups, and the filters of each.
    shape = (*w_shape[:features], g.groups, g.filters, *w_shape[features + 1 :])
    left = tuple(a if a < features else a + 1 for a in (*rhs_spec[2:], rhs_spec[1]))

    def factors(x: jax.Array, cotangent: jax.Array) -> Factors:
        examples = x.shape[0]
        x = convolution.channels_last(x, lhs_spec, lead=1)
        # What each output position sees of the image: (b·images, positions, kernel, channels).
        cut = convolution.patches(x.reshape(-1, *x.shape[2:]), g)
        cut = cut.reshape(examples, positions, kernel, g.groups, g.channels)
        # To (b, groups, positions, kernel, channels), the last two being p.
        cut = cut.transpose(0, 3, 1, 2, 4).reshape(examples, g.groups, positions, -1)
        out = convolution.channels_last(cotangent, out_spec, lead=1)
        out = out.reshape(examples, positions, g.groups, g.filters).swapaxes(1, 2)
        return cut, out

    return Rule(1, shape, (features,), left, (features + 1,), positions, factors)


def _gather(equation: jaxprs.Equation, operand: int) -> Rule | None:
    """Entries of a table, as in an embedding."""
    numbers = equation.params["dimension_numbers"]
    collapsed, batching = numbers.collapsed_slice_dims, numbers.operand_batching_dims
    kept = _others(len(equation.invars[0].aval.shape), collapsed, batching)
    windows = dict(zip(kept, numbers.offset_dims, strict=True))
    batched = dict(zip(batching, numbers.start_indices_batching_dims, strict=True))
    lookup = _Lookup(numbers.start_index_map, windows, batched)
    return _look_up(equation, lookup, lambda indices: indices) if operand == 0 else None


def _dynamic_slice(equation: jaxprs.Equation, operand: int) -> Rule | None:
    """A window of a table, such as one row: a single look-up by indices given one by one."""
    axes = tuple(range(len(equation.invars[0].aval.shape)))
    lookup = _Lookup(axes, dict(zip(axes, axes, strict=True)), {})

    def stacked(indices: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
        given = indices if isinstance(indices, tuple) else (indices,)
        return jnp.stack([_wide(i) for i in given], axis=-1)  # (b, axes)

    return _look_up(equation, lookup, stacked) if operand == 0 and axes else None


class _Lookup(NamedTuple):
    """Where the axes of a table are looked up, and where they go.

    Attributes:
      indexed: The axes that the last axis of the indices names.
      windows: For axes that go on into the output, their place there.
      batched: For axes that are looked up in step with an axis of the indices, that axis.
    """

    indexed: tuple[int, ...]
    windows: dict[int, int]
    batched: dict[int, int]


def _look_up(
    equation: jaxprs.Equation, lookup: _Lookup, indices_of: Callable[[Any], jax.Array]
) -> Rule | None:
    """Look-ups of windows into a table.

    Axes of which every look-up sees the whole belong to `right`. The others are `left`: each entry
    of a window is a position, whose one-hot vector says which entry of these axes it is.
    """
    params = equation.params
    table, sizes = equation.invars[0].aval.shape, params["slice_sizes"]
    mode = params.get("mode", GatherScatterMode.CLIP)
    left = tuple(a for a, size in enumerate(table) if sizes[a] != size)
    right = _others(len(table), left)
    out_rank = len(equation.outvars[0].aval.shape)
    looked_up = _others(out_rank, lookup.windows.values())  # axes of the output
    count = math.prod(equation.outvars[0].aval.shape[a] for a in looked_up)
    window, q = (math.prod(sizes[a] for a in axes) for axes in (left, right))
    rows = math.prod(table[a] for a in left)
    if mode not in MODES or rows >= 2**31:
        return None

    def starts(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where each look-up starts in the flattened left axes, (b, count), and if inside."""
        flat, inside = jnp.zeros(indices.shape[:-1], jnp.int32), jnp.ones(indices.shape[:-1], bool)
        for axis, size in enumerate(table):
            stride = math.prod(table[a] for a in left if a > axis)
            if axis in lookup.indexed:
                index, last = indices[..., lookup.indexed.index(axis)], size - sizes[axis]
                inside &= (index >= 0) & (index <= last)
                index = jnp.clip(index, 0, last).astype(jnp.int32)
            elif axis in lookup.batched:
                index = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 1 + lookup.batched[axis])
            else:
                continue
            flat += index * (stride if axis in left else 0)
        return flat.reshape(-1, count), inside.reshape(-1, count)

    def factors(x: Any, cotangent: jax.Array) -> Factors:
        flat, inside = starts(_wide(indices_of(x)))
        steps = [math.prod(table[b] for b in left if b > a) * np.arange(sizes[a]) for a in left]
        within = sum(np.meshgrid(*steps, indexing="ij"), start=np.zeros((), int)).reshape(-1)
        rows_seen = flat[:, :, None] + within.astype(np.int32)[None, None]  # (b, count, window)
        # What was looked up, the window of the left axes, then what is in a row.
        shown = (*looked_up, *(lookup.windows[a] for a in (*left, *right) if a in lookup.windows))
        out = cotangent.transpose(0, *(1 + a for a in shown)).reshape(-1, count, window, q)
        if mode == GatherScatterMode.FILL_OR_DROP:
            out = jnp.where(inside[:, :, None, None], out, jnp.zeros((), out.dtype))
        return rows_seen.reshape(-1, count * window), out.reshape(-1, 1, count * window, q)

    apart = count == math.prod(table[a] for a in lookup.batched)
    rows = _others(out_rank, [lookup.windows[a] for a in right if a in lookup.windows])
    return Rule(0, table, (), left, right, count * window, factors, True, apart, rows)


MODES = (
    GatherScatterMode.CLIP,
    GatherScatterMode.FILL_OR_DROP,
    GatherScatterMode.PROMISE_IN_BOUNDS,
)


def _wide(indices: jax.Array) -> jax.Array:
    """Indices of a type that the number of rows fits."""
    return indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices


def _others(rank: int, *axes: Any) -> tuple[int, ...]:
    taken = {axis for group in axes for axis in group}
    return tuple(axis for axis in range(rank) if axis not in taken)


RULES: dict[str, Callable[[jaxprs.Equation, int], Rule | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
