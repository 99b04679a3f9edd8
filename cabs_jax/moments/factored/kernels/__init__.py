"""Pallas kernels for TPUs: the gradient of a weight, with per-example norms in its epilogue.

Σ_i g_i and all ‖g_i‖² are made in one go: the gradient of each example stays in VMEM, tile by tile,
where it is added to the sum and squared. Neither the gradients nor Gram matrices of positions, nor
patches of images, pass through memory. The kernels are forms of the `trace` alone.
"""

from __future__ import annotations

import jax
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import cost
from cabs_jax.moments.factored.kernels.dense import weight_gradient
from cabs_jax.moments.factored.kernels.filters import covers, filter_gradient
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.target import Target

DTYPES = ("float32", "bfloat16")


def covered(equation: jaxprs.Equation, rule: Rule) -> bool:
    """Whether a kernel covers a site, and no other form is cheaper.

    Args:
      equation: The site's.
      rule: Its rule.
    """
    others = [v.aval.dtype for i, v in enumerate(equation.invars) if i != rule.operand]
    dtypes = [*others, equation.outvars[0].aval.dtype]
    if rule.one_hot or not all(dtype in DTYPES for dtype in dtypes):
        return False
    if jaxprs.name(equation) == "conv_general_dilated":
        return covers(equation)
    return cost.prefers_kernel(rule.sizes())


def measured(
    equation: jaxprs.Equation,
    rule: Rule,
    x: jax.Array,
    cotangent: jax.Array,
    precision: lax.Precision | None,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the examples' gradients (groups, p, q), and their squared norms (examples,).

    Args:
      equation: That of a site which is covered.
      rule: Its rule.
      x: The other operand, with a leading axis of examples.
      cotangent: The cotangents of the output, likewise.
      precision: Of the products.
      target: The machine.

    Returns:
      Both in float32.
    """
    if x.dtype == cotangent.dtype == "bfloat16":
        precision = None  # the products of such numbers are exact
    elif precision is lax.Precision.HIGH:  # which no kernel has
        precision = lax.Precision.HIGHEST
    interpret = target.kernels == "interpret"
    if jaxprs.name(equation) == "conv_general_dilated":
        return filter_gradient(equation, x, cotangent, precision, interpret)
    return weight_gradient(*rule.factors(x, cotangent), precision, interpret)
