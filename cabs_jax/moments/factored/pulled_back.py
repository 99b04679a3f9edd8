"""Norms and squares of the gradients of parameters that meet examples behind functions of them.

The weight u = f(w) that an example meets may be a function of parameters, such as v/‖v‖ or a
product of two. Its gradient there is made of factors, and that of w is the same pulled back,
g_i = f'(w)ᵀ ∂ℓ_i/∂u. What the factors are made of is collected, as for parameters that are used
several times, and once the backward pass is over all of it is pulled back through the functions at
once, without writing a gradient out where that can be helped (see `separable`), and in blocks that
stay in cache where not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cabs_jax.moments import jaxprs
from cabs_jax.moments.blocks import sum_in_cache
from cabs_jax.moments.factored import cost, outer_products, separable
from cabs_jax.moments.factored.choice import Choice, Mode
from cabs_jax.moments.factored.forms import is_direct, rounds_alike
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.factored.site_vjps import gradients
from cabs_jax.moments.factored.sorted_loss import Program, Site, Step, walk_shared
from cabs_jax.moments.factored.values import Sample
from cabs_jax.moments.target import Target
from cabs_jax.statistics import PyTree, Variance

Operands: TypeAlias = tuple[jax.Array, jax.Array]


def empty_operands(
    program: Program, choices: Sequence[Choice], sample: Sample
) -> dict[int, Operands]:
    """Slots for the operand and the cotangents at the sites of such parameters, by number."""
    slots = {}
    for number in numbers_of(choices):
        x, cotangent = operands_at(program.sites[number])
        slots[number] = (
            sample.zeros((sample.examples, *x.shape), x.dtype),
            sample.zeros((sample.examples, *cotangent.shape), cotangent.dtype),
        )
    return slots


def operands_at(site: Site) -> tuple[Any, Any]:
    """What the operand and the cotangent of an example look like at a site."""
    return site.equation.invars[1 - _rule(site).operand].aval, site.equation.outvars[0].aval


def pulled_back(
    program: Program,
    choices: Sequence[Choice],
    leaves: Sequence[jax.Array],
    operands: dict[int, Operands],
    variance: Variance,
    sample: Sample,
) -> dict[int, jax.Array]:
    """Squares of the gradients of such parameters, by parameter.

    Args:
      program: The sorted loss.
      choices: How each parameter is measured.
      leaves: The parameters.
      operands: What was collected at their sites.
      variance: Whether squares are summed over examples ("diagonal"), or over entries.
      sample: The examples.

    Returns:
      Sums over examples, shaped like the parameters, or squared norms (m,).
    """
    numbers, target = numbers_of(choices), sample.target
    if not numbers:
        return {}
    pulled = {i: leaves[i] for i, c in enumerate(choices) if c.mode is Mode.PULLED_BACK}
    jaxpr, consts = _pull(program, pulled, leaves, numbers)

    def of_parameters(operands: dict[int, Operands]) -> dict[int, separable.Products]:
        met = [_gradient(program.sites[n], *operands[n], target) for n in numbers]
        found = separable.follow(jaxpr, consts, met, target.vmap)
        # What is no sum of products is the zero of a function that has no slope.
        sums = [products if isinstance(products, tuple) else () for products in found]
        return dict(zip(pulled, sums, strict=True))

    def block(operands: dict[int, Operands]) -> tuple[PyTree, dict[int, jax.Array]]:
        examples = jax.tree.leaves(operands)[0].shape[0]
        return (), {i: separable.norms(g, examples) for i, g in of_parameters(operands).items()}

    own = {number: operands[number] for number in numbers}
    if variance == "diagonal":
        return {i: separable.square_sums(g, pulled[i].shape) for i, g in of_parameters(own).items()}
    sites = [program.sites[number] for number in numbers]
    norms: dict[int, jax.Array] = sum_in_cache(block, own, bytes_needed(sites, target), target)[1]
    return norms


def numbers_of(choices: Sequence[Choice]) -> list[int]:
    """The numbers of the sites of such parameters."""
    found = {n for choice in choices if choice.mode is Mode.PULLED_BACK for n in choice.sites}
    return sorted(found)


def _pull(
    program: Program,
    pulled: dict[int, jax.Array],
    leaves: Sequence[jax.Array],
    numbers: Sequence[int],
) -> tuple[jaxprs.Jaxpr, Sequence[Any]]:
    """The derivative of the weights at some sites by parameters, transposed: a linear jaxpr."""

    def weights(pulled: dict[int, jax.Array]) -> list[jax.Array]:
        found: dict[int, jax.Array] = {}

        def meet(step: Step, values: list[Any]) -> None:
            if step.site in numbers:
                found[step.site] = values[_rule(program.sites[step.site]).operand]

        walk_shared(program, [pulled.get(i, leaf) for i, leaf in enumerate(leaves)], meet)
        return [found[number] for number in numbers]

    met, pull = jax.vjp(weights, pulled)
    return jaxprs.open_jaxpr(jaxprs.trace(pull, met)[0])


def _gradient(site: Site, x: jax.Array, cotangent: jax.Array, target: Target) -> separable.Products:
    """The gradients of some examples with respect to the weight at a site."""
    rule = _rule(site)
    if _is_written_out(site, target):
        return separable.written_out(gradients(target, site.equation, rule, (x, cotangent)))
    left, right = rule.factors(x, cotangent)
    if rounds_alike(site.equation, target):
        left, right = outer_products.rounded((left, right))
    factors = _aligned(rule, rule.left, left), _aligned(rule, rule.right, right)
    return (separable.Product(factors, rule.shape),)


def _aligned(rule: Rule, side: tuple[int, ...], factor: jax.Array) -> jax.Array:
    """Lays a factor (m, groups, positions, n) out along the axes of the weight."""
    axes = (*rule.groups, *side)
    m, positions = factor.shape[0], factor.shape[2]
    x = factor.swapaxes(1, 2).reshape(m, positions, *(rule.shape[axis] for axis in axes))
    x = x.transpose(0, 1, *(2 + place for place in np.argsort(axes).tolist()))
    missing = [2 + axis for axis in range(len(rule.shape)) if axis not in axes]
    return jnp.expand_dims(x, missing).astype(jnp.float32)


def _is_written_out(site: Site, target: Target) -> bool:
    """Whether the gradient at a site is written out to be pulled back, not kept as factors."""
    rule = _rule(site)
    weight = site.equation.invars[rule.operand].aval
    return rule.shape != weight.shape or is_direct(site.equation, rule, target)


def bytes_needed(sites: Sequence[Site], target: Target) -> int:
    """Float32 bytes that one example needs while what comes from some sites is pulled back."""
    sizes = [_rule(site).sizes() for site in sites]
    factors = len(sites) == 1 and sizes[0][1] == 1 and not _is_written_out(sites[0], target)
    return sum(cost.norm_bytes(one, direct=not factors) for one in sizes)


def _rule(site: Site) -> Rule:
    assert site.rule is not None  # else its parameters are held
    return site.rule
