"""Ways of looking at a parameter from which the norm of its gradient is known.

A reshape, transpose, cast or slice of a parameter is a view: each entry of the view is one
entry of the parameter. The squared norm of the gradient is then the same for both, and two uses of
one parameter can be compared by the strides with which they walk through it.

Where entries are scaled or masked by constants, reversed, permuted, padded, or put together from
several parameters (`concatenate`), each entry u of the result is still one entry w of a parameter
times a constant c, or a constant. Then ∂ℓ/∂w = c ∂ℓ/∂u, and squared norms are weighted sums of
squares. So they are where parameters are added up, u = Σ_k c_k w_k: then c² is Σ_k c_k².
Such a result is a mosaic: its pieces are known, but not where each of their entries went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from cabs_jax.moments import jaxprs

Dim = tuple[int, int]  # (size, stride)
IDENTITIES = {"copy", "copy_p", "name", "optimization_barrier", "pvary", "reduce_precision"}
ADDING = {"add", "add_any"}
REARRANGING = {
    "dynamic_slice",
    "gather",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
    "transpose",
}


class Window(NamedTuple):
    """The part [start, stop) of one axis, named by its stride and length, that a view keeps."""

    stride: int
    length: int
    start: int
    stop: int


class View(NamedTuple):
    """A strided view of one parameter.

    Attributes:
      leaf: Which parameter, by its place among the leaves of the tree.
      axes: For each axis of the view, the (size, stride) pairs it runs through, slowest first;
        strides count entries of the parameter in row-major order.
      looped: The (size, stride) pairs that enclosing scans run through.
      offset: Where it starts.
      windows: The slices taken.
      repeats: How often enclosing scans show the same entries again.
    """

    leaf: int
    axes: tuple[tuple[Dim, ...], ...]
    looped: tuple[Dim, ...] = ()
    offset: int = 0
    windows: frozenset[Window] = frozenset()
    repeats: int = 1


class Mosaic(NamedTuple):
    """Entries of views, each at most once and times a constant, in an order that is not followed.

    Attributes:
      pieces: The views that hold all of the entries; no two share one.
      weighted: Whether the constants may differ from entry to entry.
    """

    pieces: tuple[View, ...]
    weighted: bool = False


Seen: TypeAlias = View | Mosaic


def pieces(seen: Seen) -> tuple[View, ...]:
    """The views whose entries are seen."""
    return seen.pieces if isinstance(seen, Mosaic) else (seen,)


def is_weighted(seen: Seen | None) -> bool:
    """Whether entries of parameters may be seen multiplied by constants that differ."""
    return isinstance(seen, Mosaic) and seen.weighted


def whole(leaf: int, shape: tuple[int, ...]) -> View:
    """The view of a parameter as it is.

    >>> whole(0, (2, 3)).axes
    (((2, 3),), ((3, 1),))
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return View(leaf, tuple(((size, stride),) for size, stride in zip(shape, strides, strict=True)))


def scanned(view: Seen) -> Seen:
    """The view of one step of a scan over the leading axis."""
    if isinstance(view, Mosaic):
        return view
    return view._replace(axes=view.axes[1:], looped=view.looped + view.axes[0])


def repeated(view: Seen, length: int) -> Seen:
    """The view of a step of a scan to which it is constant: each step sees the same again."""
    if isinstance(view, Mosaic):
        return view._replace(
            pieces=tuple(p._replace(repeats=p.repeats * length) for p in view.pieces)
        )
    return view._replace(repeats=view.repeats * length)


def taken_in_turn(view: Seen, length: int) -> Seen:
    """The view of an entry of some axis, at each step of a scan another one."""
    taken = tuple(p._replace(repeats=p.repeats // length) for p in pieces(view))
    return Mosaic(taken, is_weighted(view))


def merge(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Joins neighbouring axes that together are one; drops those of size one.

    >>> merge(((2, 12), (3, 4), (4, 1)))
    ((24, 1),)
    """
    merged: list[Dim] = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def layout(view: View, axes: tuple[int, ...]) -> tuple[Dim, ...]:
    """The entries of the parameter that some axes of a view run through, in a normal form."""
    dims = [dim for axis in axes for dim in view.axes[axis]]
    return merge(tuple(sorted(dims, key=lambda dim: -dim[1])))


def in_order(view: View, axes: tuple[int, ...]) -> bool:
    """Whether flattening some axes of a view runs through the parameter from slow to fast."""
    strides = [stride for axis in axes for size, stride in view.axes[axis] if size > 1]
    return strides == sorted(strides, reverse=True)


def disjoint(first: View, second: View) -> bool:
    """Whether two views surely share no entry of the parameter."""
    return any(
        (a.stride, a.length) == (b.stride, b.length) and (a.stop <= b.start or b.stop <= a.start)
        for a in first.windows
        for b in second.windows
    )


def apart(views: Sequence[View]) -> bool:
    """Whether no two views of one parameter share an entry, as far as can be told."""
    return all(a.leaf != b.leaf or disjoint(a, b) for i, a in enumerate(views) for b in views[:i])


def through(operands: Sequence[Seen | None], equation: jaxprs.Equation) -> Sequence[Seen] | None:
    """Follows what is seen through an equation.

    Args:
      operands: What each operand sees of parameters; None for constants.
      equation: The equation.

    Returns:
      A view or mosaic for each output, or None where the equation does more than that.
    """
    places = {place for place, operand in enumerate(operands) if operand is not None}
    first = operands[0]
    if places == {0} and first is not None:
        if keeps_entries(equation):
            return [first]
        strided = _strided(first, equation) if isinstance(first, View) else None
        if strided is not None:
            return strided
    if jaxprs.name(equation) in ADDING and len(places) == 1 and _alike(equation, places):
        return [operand for operand in operands if operand is not None]
    seen = [piece for operand in operands if operand is not None for piece in pieces(operand)]
    if _is_mosaic(equation, places) and apart(seen):
        weighted = any(map(is_weighted, operands)) or _weighs(equation, places)
        return [Mosaic(tuple(seen), weighted)] * len(equation.outvars)
    return None


def keeps_entries(equation: jaxprs.Equation) -> bool:
    """Whether the only output is the first operand, but for its precision."""
    cast = jaxprs.name(equation) == "convert_element_type"
    real = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    return bool(jaxprs.name(equation) in IDENTITIES or (cast and real))


def rearranges(equation: jaxprs.Equation, place: int) -> bool:
    """Whether the only output shows entries of one operand, each at most once and as it is."""
    if len(equation.outvars) != 1:
        return False
    operands: list[Seen | None] = [None] * len(equation.invars)
    operands[place] = whole(0, equation.invars[place].aval.shape)
    seen = through(operands, equation)
    return seen is not None and isinstance(seen[0], View)


def _alike(equation: jaxprs.Equation, places: set[int]) -> bool:
    """Whether the operands at these places have the shape of the output."""
    shape = equation.outvars[0].aval.shape
    return all(equation.invars[place].aval.shape == shape for place in places)


def _is_mosaic(equation: jaxprs.Equation, places: set[int]) -> bool:
    """Whether entries of the output are constants or entries at these places times a constant.

    None of these entries is there twice, and none meets another but in a sum.
    """
    primitive, shape = jaxprs.name(equation), equation.outvars[0].aval.shape
    alike = _alike(equation, places)
    match primitive:
        case "concatenate" | "stack":
            return True
        case "add" | "add_any":
            return alike
        case "select_n":
            return alike and 0 not in places
        case "sub":
            return alike
        case "mul":
            return alike and len(places) == 1
        case "div" | "neg":
            return alike and places == {0}
        case "dynamic_update_slice":
            return places <= {0, 1}
        case "gather":  # of entries that differ, none of them outside
            promised = equation.params["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS
            return places == {0} and promised and bool(equation.params["unique_indices"])
        case "broadcast_in_dim":
            return bool(math.prod(shape) == math.prod(equation.invars[0].aval.shape))
    return places == {0} and primitive in {"pad", *REARRANGING}


def _weighs(equation: jaxprs.Equation, places: set[int]) -> bool:
    """Whether a mosaic multiplies entries by different constants, or has constants among them."""
    primitive = jaxprs.name(equation)
    constants = [v.aval.shape for i, v in enumerate(equation.invars) if i not in places]
    if primitive in {"mul", "div"}:
        return any(constants)
    if primitive in {"concatenate", "stack"}:
        return bool(constants)
    return primitive in {"dynamic_update_slice", "pad", "select_n"}


def _strided(view: View, equation: jaxprs.Equation) -> list[View] | None:
    """Follows a view through an equation that only rearranges, if strides can tell how."""
    primitive, params = jaxprs.name(equation), equation.params
    shapes = [out.aval.shape for out in equation.outvars]
    if primitive == "transpose":
        return [view._replace(axes=tuple(view.axes[axis] for axis in params["permutation"]))]
    if primitive == "squeeze":
        kept = [a for axis, a in enumerate(view.axes) if axis not in params["dimensions"]]
        return [view._replace(axes=tuple(kept))]
    if primitive == "reshape" and params["dimensions"] is None:
        seen = reshaped(view, shapes[0])
        return None if seen is None else [seen]
    if primitive == "broadcast_in_dim":
        return _expanded(view, equation.invars[0].aval.shape, shapes[0], params)
    if primitive == "slice":
        strides = params["strides"] or (1,) * len(view.axes)
        if any(stride != 1 for stride in strides):
            return None
        return _sliced(view, params["start_indices"], params["limit_indices"])
    if primitive == "split":
        return _split(view, equation.invars[0].aval.shape, params)
    return None


def shown(seen: Seen, shape: tuple[int, ...]) -> Seen:
    """What is seen once it is reshaped."""
    strided = reshaped(seen, shape) if isinstance(seen, View) else None
    return strided or Mosaic(pieces(seen), is_weighted(seen))


def reshaped(view: View, shape: tuple[int, ...]) -> View | None:
    """Deals the (size, stride) pairs out to new axes, or None if a new axis ends across them."""
    dims = list(merge(tuple(dim for axis in view.axes for dim in axis)))
    if 0 in shape:
        return None
    axes: list[tuple[Dim, ...]] = []
    for size in shape:
        axis: list[Dim] = []
        # Fill the axis from the slowest dim on; one that is too long is cut, and its rest put back.
        while size > 1:
            if not dims:
                return None
            length, stride = dims.pop(0)
            if size % length == 0:
                axis.append((length, stride))
                size //= length
            elif length % size == 0:
                axis.append((size, stride * (length // size)))
                dims.insert(0, (length // size, stride))
                size = 1
            else:
                return None
        axes.append(tuple(axis))
    return None if dims else view._replace(axes=tuple(axes))


def _expanded(
    view: View, old: tuple[int, ...], new: tuple[int, ...], params: dict[str, tuple[int, ...]]
) -> list[View] | None:
    if math.prod(old) != math.prod(new):
        return None
    axes: list[tuple[Dim, ...]] = [()] * len(new)
    for axis, target in zip(view.axes, params["broadcast_dimensions"], strict=True):
        axes[target] = axis
    return [view._replace(axes=tuple(axes))]


def _sliced(view: View, start: tuple[int, ...], stop: tuple[int, ...]) -> list[View] | None:
    axes, windows, offset = list(view.axes), set(view.windows), view.offset
    for index, (axis, low, high) in enumerate(zip(view.axes, start, stop, strict=True)):
        length = math.prod(size for size, _ in axis)
        if (low, high) == (0, length):
            continue
        if len(axis) != 1:
            return None
        stride = axis[0][1]
        # Inside what an earlier slice kept, coordinates no longer follow from the stride alone.
        if all(length * stride <= w.stride or w.length * w.stride <= stride for w in windows):
            windows.add(Window(stride, length, low, high))
        axes[index] = ((high - low, stride),)
        offset += low * stride
    return [view._replace(axes=tuple(axes), windows=frozenset(windows), offset=offset)]


def _split(
    view: View, shape: tuple[int, ...], params: dict[str, tuple[int, ...]]
) -> list[View] | None:
    axis, views = int(params["axis"]), []  # type: ignore[call-overload]
    stops = np.cumsum(params["sizes"]).tolist()
    for low, high in zip([0, *stops[:-1]], stops, strict=True):
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = low, high
        part = _sliced(view, tuple(start), tuple(stop))
        if part is None:
            return None
        views += part
    return views
