"""Norms of the gradients of what an example picks from a parameter, taken where it is multiplied.

An example that looks up a matrix of its own, `x @ experts[i]`, is the only one to use it, and the
gradient of its entry is the outer product of x and a cotangent c. It has to be written out, to be
added to the gradient of the batch at its place i, but its norm is ‖x‖·‖c‖, and nothing needs to be
written out for that. So where the product is all that the entry is used for, the norm is taken
there, and goes into the slot of the parameter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cabs_jax.moments.factored import outer_products
from cabs_jax.moments.factored.choice import product_of
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.factored.sorted_loss import Step
from cabs_jax.moments.factored.values import (
    Batched,
    Context,
    Value,
    evaluate_batched,
    to_batched,
)

Norms = dict[int, jax.Array]  # slots or squared norms (m,), by place


def evaluate_product(context: Context, step: Step, values: list[Value]) -> list[Batched]:
    """Evaluates a product of one position in which operands were picked from parameters."""
    sample, equation = context.sample, step.equation
    rules: dict[int, Rule] = {}
    slots: Norms = {}
    for place, number in step.picked:
        site = context.program.sites[number]
        ((_, parameter),) = site.parameters
        leaf = min(parameter.leaves)
        rule = product_of(site, context.choices[leaf], context.variance)
        if rule is not None:
            rules[place], slots[place] = rule, context.norms[leaf]
    if not rules:
        return evaluate_batched(sample, equation, values)

    def evaluate(operands: list[jax.Array]) -> jax.Array:
        (output,) = evaluate_batched(sample, equation, [Batched(x) for x in operands])
        return jnp.asarray(output.value)

    @jax.custom_vjp
    def apply(operands: list[jax.Array], slots: Norms) -> jax.Array:
        return evaluate(operands)

    def forward(operands: list[jax.Array], slots: Norms) -> tuple[jax.Array, list[jax.Array]]:
        return apply(operands, slots), operands

    def backward(operands: list[jax.Array], cotangent: jax.Array) -> tuple[list[jax.Array], Norms]:
        (into_operands,) = jax.vjp(evaluate, operands)[1](cotangent)
        norms = {
            place: outer_products.gram_norms([rule.factors(operands[1 - place], cotangent)])
            for place, rule in rules.items()
        }
        return into_operands, norms

    apply.defvjp(forward, backward)
    return [Batched(apply([to_batched(sample, value).value for value in values], slots))]
