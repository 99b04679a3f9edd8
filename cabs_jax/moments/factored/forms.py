"""In which form the norm is taken at a site, and what one example needs for it.

What costs least is known from the sizes of the site and the target (`cost`); here that is asked for
an equation and its rule.
"""

from __future__ import annotations

from cabs_jax.moments import convolution, jaxprs
from cabs_jax.moments.factored import cost, outer_products
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.target import Target


def is_by_kernel(equation: jaxprs.Equation, rule: Rule, target: Target) -> bool:
    """Whether a kernel makes both the gradient of the batch and the norms at a site."""
    if not target.kernels:
        return False
    from cabs_jax.moments.factored import kernels  # takes seconds to load, and few need it

    return kernels.covered(equation, rule)


def is_direct(equation: jaxprs.Equation, rule: Rule, target: Target) -> bool:
    """Whether norms at a site are taken of gradients, not by another form."""
    if rule.pooled or is_sorted(rule, target):
        return False
    others = [v.aval.dtype for i, v in enumerate(equation.invars) if i != rule.operand]
    narrow = all(dtype.itemsize == 2 for dtype in [*others, equation.outvars[0].aval.dtype])
    return cost.prefers_direct(
        rule.sizes(),
        target,
        rounded=narrow or rounds_alike(equation, target),
        one_hot=rule.one_hot,
        patches=goes_by_row(equation, target),
    )


def is_sorted(rule: Rule, target: Target) -> bool:
    """Whether rows that are put to one place at a site are found by sorting."""
    return rule.one_hot and not rule.apart and cost.prefers_sorting(rule.sizes(), target)


def is_in_table(rule: Rule, target: Target) -> bool:
    """Whether what is pooled, multiples of one vector, is put to places in a table to add it up."""
    sizes = rule.sizes_of_norms()
    return rule.pooled and cost.prefers_direct(sizes, target, one_hot=True)


def rounds_alike(equation: jaxprs.Equation, target: Target) -> bool:
    """Whether the products of a norm see the operands as the product of the mean does, rounded."""
    model = outer_products.model_precision(equation)
    return target.costs.rounds_alike and outer_products.is_default(model)


def norm_bytes(equation: jaxprs.Equation, rule: Rule, target: Target, *, direct: bool) -> int:
    """What one example needs while its norm is computed."""
    groups, positions, p, q = rule.sizes()
    if direct and convolution.is_depthwise(equation):  # nothing is laid out
        return cost.norm_bytes((groups, 1, p, q), direct=True)
    if is_sorted(rule, target):
        return cost.sorting_bytes(rule.sizes())
    return cost.norm_bytes((groups, positions, p, q), direct=direct, one_hot=rule.one_hot)


def pooled_bytes(rule: Rule, target: Target) -> int:
    """What one example needs while the norm of what is pooled is computed."""
    sizes, in_table = rule.sizes_of_norms(), is_in_table(rule, target)
    if is_sorted(rule, target) and not in_table:
        return cost.sorting_bytes(sizes)
    return cost.norm_bytes(sizes, direct=in_table, one_hot=True)


def goes_by_row(equation: jaxprs.Equation, target: Target) -> bool:
    """Whether the site is a convolution that is best measured row by row of its kernel."""
    return target.costs.patch_traffic > 0 and convolution.goes_by_row(equation)
