"""Weights that repeat or pad a parameter along its axes, and products with them.

Of x · (S w), where S is linear and acts along axes of w one by one, as `jnp.repeat` does to heads
and `jnp.pad` to channels, the gradient of each example would be formed and pulled back through S.
But along an axis that the product keeps, x · (S w) = S (x · w), and along one that it sums over,
x · (S w) = (Sᵀ x) · w. So S is applied to what belongs to the example, and w is met as it is, in a
product that is no larger.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cabs_jax.moments import jaxprs, sharding

Map = Callable[[jax.Array, int], jax.Array]  # a linear function along one axis of an array


class Spread(NamedTuple):
    """An array, and what is done along its axes.

    Attributes:
      source: The array.
      maps: For each axis, what is done along it, or None.
    """

    source: jax.Array
    maps: tuple[Map | None, ...]


def whole(array: jax.Array) -> Spread:
    """An array as it is."""
    return Spread(array, (None,) * array.ndim)


def spreads(equation: jaxprs.Equation) -> bool:
    """Whether an equation may repeat or pad what has more than one long axis, as weights have."""
    shape = equation.invars[0].aval.shape if equation.invars else ()
    several = sum(size > 1 for size in shape) > 1
    return several and jaxprs.name(equation) in {"broadcast_in_dim", "gather", "pad", "tile"}


def through(
    given: Spread, equation: jaxprs.Equation, constants: Sequence[np.ndarray | None]
) -> Spread | None:
    """Follows a weight through an equation of which it is the first operand.

    Args:
      given: The weight.
      equation: The equation.
      constants: Its other operands, None where they are not known.

    Returns:
      The output, or None where the equation does more than repeat, pad or rearrange whole axes.
    """
    source, maps = given
    params, shape = equation.params, equation.outvars[0].aval.shape
    match jaxprs.name(equation):
        case "convert_element_type":
            return Spread(source.astype(params["new_dtype"]), maps)
        case "transpose":
            order = params["permutation"]
            return Spread(source.transpose(order), tuple(maps[axis] for axis in order))
        case "reshape" if params["dimensions"] is None:
            return _reshaped(given, equation.invars[0].aval.shape, shape)
        case "broadcast_in_dim":
            return _broadcast(given, equation.invars[0].aval.shape, shape, params)
        case "tile":
            repeats = params["reps"]
            found = [None if n == 1 else functools.partial(_tile, n) for n in repeats]
            return Spread(source, tuple(map(_after, maps, found)))
        case "pad" if constants[0] is not None and constants[0] == 0:
            config = params["padding_config"]
            if all(low >= 0 <= high and not gap for low, high, gap in config):
                found = [
                    functools.partial(_pad, low, high) if low + high else None
                    for low, high, _ in config
                ]
                return Spread(source, tuple(map(_after, maps, found)))
        case "gather":
            taken = _taken_along(equation, constants[0])
            if taken is not None:
                axis, index = taken
                then = functools.partial(_take, index)
                mapped = (*maps[:axis], _after(maps[axis], then), *maps[axis + 1 :])
                return Spread(source, mapped)
    return None


def takes_distinct(equation: jaxprs.Equation, indices: np.ndarray) -> bool:
    """Whether a gather takes entries of its operand that differ from each other, none outside."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape = equation.invars[0].aval.shape
    indexed = numbers.start_index_map
    whole_or_one = all(n == (1 if a in indexed else shape[a]) for a, n in enumerate(sizes))
    if numbers.operand_batching_dims or not whole_or_one:
        return False
    limits = tuple(shape[axis] for axis in indexed)
    rows = np.asarray(indices).reshape(-1, len(limits))
    inside = bool(np.all((rows >= 0) & (rows < np.array(limits))))
    return inside and len(np.unique(rows, axis=0)) == len(rows)


def product(equation: jaxprs.Equation, x: jax.Array, place: int, given: Spread) -> Any:
    """The product x · (S w) with w itself, or None where S acts along an axis of groups.

    Args:
      equation: The `dot_general`.
      x: The example's operand.
      place: That of the weight.
      given: The weight.
    """
    contracting, batch = equation.params["dimension_numbers"]
    if any(given.maps[axis] for axis in batch[place]) or equation.params.get("out_sharding"):
        return None
    for axis, other in zip(contracting[place], contracting[1 - place], strict=True):
        along = given.maps[axis]
        x = x if along is None else _back(along, other, given.source.shape[axis], x)
    operands = [given.source, x] if place == 0 else [x, given.source]
    (y,) = jaxprs.evaluate(equation, operands)
    free = [a for a in range(len(given.maps)) if a not in (*contracting[place], *batch[place])]
    first = len(batch[0]) if place == 0 else y.ndim - len(free)
    for axis, own in enumerate(free, start=first):
        along = given.maps[own]
        y = y if along is None else along(y, axis)
    return y


def _back(along: Map, axis: int, size: int, x: jax.Array) -> jax.Array:
    """The transpose of what is done along an axis that had this size before."""
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    # An array, for of a shape alone JAX would forget over which axes of a shard_map it varies.
    before = sharding.vary(jnp.zeros(shape, x.dtype), tuple(jaxprs.varying_axes(x)))
    (back,) = jax.linear_transpose(lambda y: along(y, axis), before)(x)
    return jnp.asarray(back)


def _after(first: Map | None, then: Map | None) -> Map | None:
    """One after the other."""
    if first is None or then is None:
        return then or first
    return lambda y, axis: then(first(y, axis), axis)


def _tile(repeats: int, y: jax.Array, axis: int) -> jax.Array:
    return jnp.tile(y, [repeats if a == axis else 1 for a in range(y.ndim)])


def _pad(low: int, high: int, y: jax.Array, axis: int) -> jax.Array:
    widths = [(low, high, 0) if a == axis else (0, 0, 0) for a in range(y.ndim)]
    return lax.pad(y, jnp.zeros((), y.dtype), widths)


def _take(index: np.ndarray, y: jax.Array, axis: int) -> jax.Array:
    return jnp.take(y, index, axis, mode="clip")


def _taken_along(
    equation: jaxprs.Equation, indices: np.ndarray | None
) -> tuple[int, np.ndarray] | None:
    """The axis along which a gather takes entries, not fewer than there are, and which."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if indices is None or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,), index = numbers.start_index_map, indices
    kept = tuple(a for a in range(len(out)) if a != axis)
    rest = all(n == (1 if a == axis else shape[a]) for a, n in enumerate(sizes))
    if not rest or index.ndim != 2 or numbers.offset_dims != kept or len(index) < shape[axis]:
        return None
    inside = bool(np.all((index >= 0) & (index < shape[axis])))
    return (axis, index[:, 0]) if inside else None


def _broadcast(
    given: Spread, old: tuple[int, ...], new: tuple[int, ...], params: dict[str, Any]
) -> Spread:
    places = params["broadcast_dimensions"]
    sizes = [1] * len(new)
    maps: list[Map | None] = [None if n == 1 else functools.partial(_tile, n) for n in new]
    for axis, place in enumerate(places):
        sizes[place] = given.source.shape[axis]
        then = maps[place] if old[axis] != new[place] else None
        maps[place] = _after(given.maps[axis], then)
    return Spread(lax.broadcast_in_dim(given.source, sizes, places), tuple(maps))


def _reshaped(given: Spread, old: tuple[int, ...], new: tuple[int, ...]) -> Spread | None:
    """Axes along which something is done may be merged with their neighbours, not be split."""
    source: list[int] = []
    maps: list[Map | None] = []
    for axes, made in _matched(old, new) if 0 not in old else ():
        sizes = [given.source.shape[axis] for axis in axes]
        done = [given.maps[axis] for axis in axes]
        if not any(done):
            source += made
            maps += [None] * len(made)
        elif len(made) == 1:
            source.append(math.prod(sizes))
            maps.append(done[0] if len(axes) == 1 else functools.partial(_merged, sizes, done))
        else:
            return None
    return Spread(given.source.reshape(source), tuple(maps))


def _matched(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, tuple[int, ...]]]:
    """Which runs of old axes become which new ones: the places of those, the sizes of these.

    >>> _matched((2, 3, 4), (6, 2, 2))
    [(range(0, 2), (6,)), (range(2, 3), (2, 2))]
    """
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right, stop, end = math.prod(old[i : i + 1]), math.prod(new[j : j + 1]), i + 1, j + 1
        while left != right:
            if left < right:
                left, stop = left * old[stop], stop + 1
            else:
                right, end = right * new[end], end + 1
        runs.append((range(i, min(stop, len(old))), new[j:end]))
        i, j = stop, end
    return runs


def _merged(sizes: Sequence[int], maps: Sequence[Map | None], y: jax.Array, axis: int) -> jax.Array:
    """What is done along several axes that became one."""
    y = y.reshape(*y.shape[:axis], *sizes, *y.shape[axis + 1 :])
    for place, along in enumerate(maps, start=axis):
        y = y if along is None else along(y, place)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + len(sizes) :])
