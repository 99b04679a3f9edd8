"""Terms of a loss that depend on parameters alone, such as a penalty on their norm.

With ℓ_i = f_i(w) + r(w), every example's gradient is shifted by the same ∇r: it belongs to the mean
and cancels from the variance. So it is left out of what is squared, where it would cost precision,
and added to the mean at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored.program import Kind, Program, SortedJaxpr, Step, shifting


def shift_gradient(program: Program, leaves: Sequence[jax.Array]) -> dict[int, jax.Array]:
    """Gradient ∇r with respect to each parameter that is in such terms, float32."""
    shifted = {i: leaves[i] for i in sorted(shifting(program.body))}
    if not shifted:
        return {}
    examples = [None] * (len(program.body.inputs) - len(leaves))

    def terms(shifted: dict[int, Any]) -> jax.Array:
        values = [shifted.get(i, leaf) for i, leaf in enumerate(leaves)]
        return _sum_terms(program.body, [*values, *examples])[0]

    return {i: g.astype(jnp.float32) for i, g in jax.grad(terms)(shifted).items()}


def _sum_terms(body: SortedJaxpr, inputs: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
    """Sums the terms; returns the sum and the outputs of a sorted jaxpr.

    What depends on the example is None throughout, and is not evaluated.
    """
    total = jnp.zeros((), jnp.float32)

    def visit(step: Step, values: list[Any]) -> list[Any]:
        nonlocal total
        given = [value for value in values if value is not None]
        if step.kind is Kind.CALL and step.inner is not None:
            more, outputs = _sum_terms(step.inner, values)
            total = total + more
            return outputs
        if step.kind is Kind.SHIFT:  # one operand is of the example, the other is the term
            total = total + sum(given).astype(jnp.float32)
        elif len(given) == len(values):
            return jaxprs.evaluate(step.equation, values)
        return [None] * len(step.equation.outvars)

    outputs = jaxprs.walk(body.jaxpr, body.consts, inputs, body.steps, visit, lambda x: x)
    return total, outputs
