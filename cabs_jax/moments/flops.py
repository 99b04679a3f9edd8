"""Floating-point operations of a program, every loop's body counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, which would make anything done in blocks
look cheap. The conventions are XLA's: two operations for a multiplication and addition in a
contraction, one for each entry of any other result.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from cabs_jax.moments import jaxprs


def flops(function: Any, *args: Any) -> int:
    """Operations of `function(*args)`, leaving out what its result does not need."""
    closed, _ = jaxprs.trace(function, *args)
    return _of_jaxpr(jaxprs.needed(closed.jaxpr)[0])


def of_equation(equation: jaxprs.Equation) -> int:
    """Operations of one equation, and of the jaxprs that it holds."""
    kind, params = equation.primitive.name, equation.params
    inner = [_of_jaxpr(jaxpr) for jaxpr in jaxprs.subjaxprs(equation)]
    if kind == "scan":
        return int(params["length"]) * sum(inner)
    if kind == "cond":
        return max(inner)
    if kind == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        summed = math.prod(int(shape[axis]) for axis in contracting)
        return 2 * _size(equation.outvars[0]) * summed
    if kind == "conv_general_dilated":
        return _of_convolution(equation)
    if inner:
        return sum(inner)
    if kind in _MOVES:
        return 0
    floating = [v for v in equation.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    if kind.startswith("reduce_") and floating:
        return _size(equation.invars[0])
    return sum(map(_size, floating))


def _of_jaxpr(jaxpr: jaxprs.Jaxpr) -> int:
    return sum(map(of_equation, jaxpr.eqns))


def _of_convolution(equation: Any) -> int:
    """Leaves out products with padding and with the zeros of a dilation."""
    lhs_spec, rhs_spec, out_spec = equation.params["dimension_numbers"]
    lhs, rhs, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    products: int = out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]
    settings = (
        equation.params[name]
        for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    )
    axes = zip(lhs_spec[2:], rhs_spec[2:], out_spec[2:], *settings, strict=True)
    for left, right, result, stride, (low, _), lhs_dilation, rhs_dilation in axes:
        outputs, gradient_slots = np.arange(out[result])[:, None], np.arange(rhs[right])[None]
        place = outputs * stride + gradient_slots * rhs_dilation - low
        inside = (place >= 0) & (place <= (lhs[left] - 1) * lhs_dilation)
        products *= int(np.sum(inside & (place % lhs_dilation == 0)))
    return 2 * products


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


_MOVES = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "iota",
    "pad",
    "reshape",
    "rev",
    "select_n",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}
