"""Squared norms of the gradient of a parameter that is used several times.

Its gradient is the sum over its uses, g = Σ_u g_u, and ‖g‖² has cross terms ⟨g_u, g_v⟩ that no
site knows on its own. So each site returns the factors of its outer products, and the norm is taken
here, once the backward pass is over. All uses look at the parameter in one layout: their outer
products are further terms of one sum, as if all were positions of one larger use. So are those of
the steps of a scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cabs_jax.moments.blocks import sum_in_cache
from cabs_jax.moments.factored import cost, outer_products, views
from cabs_jax.moments.factored.choice import Choice, Mode, Use
from cabs_jax.moments.factored.primitives import Factors
from cabs_jax.moments.factored.values import Sample
from cabs_jax.moments.target import Target
from cabs_jax.statistics import PyTree, squared_norms


def empty_factors(choices: Sequence[Choice], sample: Sample) -> dict[int, Factors]:
    """Slots for the factors of all uses that are collected, by the number of the site.

    A scan around the site adds a leading axis to them, as to anything that it goes through.
    """
    return {
        use.number: _empty(use, sample)
        for choice in choices
        if choice.mode is Mode.COLLECTED
        for use in choice.uses
    }


def _empty(use: Use, sample: Sample) -> Factors:
    groups, positions, p, q = use.rule.sizes()
    lead, equation = (*use.site.scans, sample.examples), use.site.equation
    left_dtype = equation.invars[1 - use.rule.operand].aval.dtype
    right = sample.zeros((*lead, groups, positions, q), equation.outvars[0].aval.dtype)
    if use.rule.one_hot:
        return sample.zeros((*lead, positions)), right
    return sample.zeros((*lead, groups, positions, p), left_dtype), right


def norms_of_sums(
    choices: Sequence[Choice], factors: dict[int, Factors], target: Target
) -> dict[int, jax.Array]:
    """Squared norms (m,) of the gradients whose factors were collected, by parameter."""
    return {
        leaf: _norms(choice.uses, factors, target)
        for leaf, choice in enumerate(choices)
        if choice.mode is Mode.COLLECTED
    }


def _norms(uses: Sequence[Use], factors: dict[int, Factors], target: Target) -> jax.Array:
    """Squared norms (m,) of one parameter's gradients, each the sum over its uses."""
    # Indices stand on the left; a tied output head has left and right exchanged.
    first = min(uses, key=lambda use: not use.rule.one_hot)
    groups, _, p, q = first.sizes()
    sizes = groups, sum(use.sizes()[1] for use in uses), p, q
    direct = cost.prefers_direct(sizes, target)

    def sided(use: Use) -> Factors:
        left, right = _steps_as_positions(use, factors[use.number])
        return (left, right) if _left(use) == _left(first) else (right, left)

    def block(operands: list[Factors]) -> tuple[PyTree, jax.Array]:
        if not direct:
            return (), outer_products.gram_norms(operands)
        g = sum(outer_products.gradients(of_use, p) for of_use in operands)
        return (), squared_norms(jnp.asarray(g), 1)  # (m, groups, p, q) to (m,)

    needed = cost.norm_bytes(sizes, direct=direct)
    norms: jax.Array = sum_in_cache(block, [sided(use) for use in uses], needed, target)[1]
    return norms


def _left(use: Use) -> tuple[views.Dim, ...]:
    """The entries of the parameter that the left factor of a use runs through."""
    assert isinstance(use.view, views.View)  # mosaics are never collected
    return views.layout(use.view, use.rule.left)


def _steps_as_positions(use: Use, factors: Factors) -> Factors:
    """Makes the steps of the scans around a site positions of its factors."""
    depth, (left, right) = len(use.site.scans), factors
    right = _merge_steps(right, depth, 2)
    if use.rule.one_hot:
        return _merge_steps(left, depth, 1).astype(jnp.int32), right
    return _merge_steps(left, depth, 2), right


def _merge_steps(x: jax.Array, depth: int, axis: int) -> jax.Array:
    """Merges `depth` leading axes into an axis of what follows them.

    From (*steps, m, groups, positions, p) to (m, groups, steps · positions, p) where `axis` is 2.
    """
    order = (*range(depth, depth + axis), *range(depth), *range(depth + axis, x.ndim))
    x = x.transpose(order)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + depth + 1 :])
