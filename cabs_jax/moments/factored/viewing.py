"""Evaluates what does no more than look at parameters (see `views`), and brings along their slots.

A view u = V(w) takes each of its entries u = c·w from one entry of a parameter, or has a constant
there. Slots for gradients and sums of them are moved as the entries are, by the linear part of V;
JAX's derivative of that moves their cotangents back. Slots for squares are moved with c² for c,
since (∂ℓ/∂w)² = c² (∂ℓ/∂u)². Where only ‖∂ℓ/∂w‖² is wanted, the site needs the c: they are the
scale.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cabs_jax.moments import jaxprs, sharding
from cabs_jax.moments.factored import views
from cabs_jax.moments.factored.values import Sample, Shared

MULTIPLYING = {"div", "mul", "neg"}
ADDING = {"sub", *views.ADDING}


def evaluate_view(
    sample: Sample, equation: jaxprs.Equation, values: list[Shared], viewed: tuple[int, ...]
) -> list[Shared]:
    """Evaluates a view of the operands at some places; the others are constants."""
    arrays = [v.value for v in values]
    outputs = jaxprs.evaluate(equation, arrays)
    if views.keeps_entries(equation):  # slots are float32 whatever the value is cast to
        return [values[0]._replace(value=outputs[0])]
    move = functools.partial(_move, equation, arrays)
    gradient_slots: list[Any] = [None] * len(outputs)
    square_slots: list[Any] = [None] * len(outputs)
    again_slots: list[Any] = [None] * len(outputs)
    slots = {i: s for i in viewed if (s := values[i].gradient_slots) is not None}
    if slots:  # (m, *shape): the same for every example
        gradient_slots = sample.target.vmap(move)(slots)
    slots = {i: s for i in viewed if (s := values[i].square_slots) is not None}
    if slots:
        square_slots = move(slots)
        if _adds_up(equation, viewed):
            square_slots = [sum(slots.values())]
        elif jaxprs.name(equation) in MULTIPLYING | ADDING:
            factors = move({i: _ones(arrays[i]) for i in viewed})
            square_slots = [s * c for s, c in zip(square_slots, factors, strict=True)]
    slots = {i: s for i in viewed if (s := values[i].again_slots) is not None}
    if slots:
        again_slots = move(slots)
    scales = _scales(equation, values, viewed)
    parts = zip(outputs, gradient_slots, square_slots, again_slots, scales, strict=True)
    return [Shared(*part) for part in parts]


def _adds_up(equation: jaxprs.Equation, viewed: tuple[int, ...]) -> bool:
    """Whether entries of parameters meet others, in a sum or a difference."""
    return jaxprs.name(equation) in ADDING and len(viewed) == 2


def _move(equation: jaxprs.Equation, arrays: list[Any], moved: dict[int, jax.Array]) -> list[Any]:
    """Applies the linear part of a view to what belongs to the entries of its operands."""
    operands = []
    for place, x in enumerate(map(jnp.asarray, arrays)):
        if place in moved:
            operands.append(moved[place])
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            operands.append(x)
        elif jaxprs.name(equation) in MULTIPLYING:
            operands.append(x.astype(jnp.float32))
        else:  # constants among the entries, or added to them
            operands.append(jnp.zeros_like(_ones(x)))
    return jaxprs.evaluate(equation, operands)


def _scales(equation: jaxprs.Equation, values: list[Shared], viewed: tuple[int, ...]) -> list[Any]:
    """What parameters are multiplied by in the entries of each output, in as few numbers."""
    known = {i: values[i].scale for i in viewed}
    first, primitive = known[viewed[0]], jaxprs.name(equation)
    constants = [v.value for i, v in enumerate(values) if i not in known]
    same = all(scale is None for scale in known.values())
    uniform = len(known) == 1 and (first is None or not first.ndim)
    if _adds_up(equation, viewed):
        terms = [1.0 if scale is None else jnp.square(scale) for scale in known.values()]
        return [jnp.sqrt(jnp.float32(terms[0] + terms[1]))]
    if primitive in ADDING | {"neg"}:
        return [first]
    if uniform and primitive in views.REARRANGING | {"broadcast_in_dim"}:
        return [first] * len(equation.outvars)
    if same and primitive in {"concatenate", "stack"} and not constants:
        return [None]
    if uniform and primitive in MULTIPLYING and not any(map(jnp.ndim, constants)):
        one = _ones(values[viewed[0]].value, ())
        return _move(equation, [v.value for v in values], {viewed[0]: one if same else first})
    moved = {}
    for place, scale in known.items():
        ones = _ones(values[place].value)
        moved[place] = ones if scale is None else ones * scale
    return _move(equation, [v.value for v in values], moved)


def _ones(x: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Float32 ones like an array, known to differ over the same mesh axes."""
    ones: jax.Array = jnp.ones_like(x, jnp.float32, shape)
    missing = tuple(jaxprs.varying_axes(x) - jaxprs.varying_axes(ones))
    varied: jax.Array = sharding.vary(ones, missing)
    return varied
