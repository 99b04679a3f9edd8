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

from cabs_jax.moments.factored.sorted_loss import Kind, Program, Step, shifting, walk_shared


def shift_gradient(program: Program, leaves: Sequence[jax.Array]) -> dict[int, jax.Array]:
    """Gradient ∇r with respect to each parameter that is in such terms, float32."""
    shifted = {i: leaves[i] for i in sorted(shifting(program.body))}
    if not shifted:
        return {}

    def terms(shifted: dict[int, Any]) -> jax.Array:
        found: list[jax.Array] = []

        def meet(step: Step, values: list[Any]) -> None:
            if step.kind is Kind.SHIFT:  # one operand is of the example, the other is the term
                found.extend(v.astype(jnp.float32) for v in values if v is not None)

        walk_shared(program, [shifted.get(i, leaf) for i, leaf in enumerate(leaves)], meet)
        return sum(found, start=jnp.zeros((), jnp.float32))

    return {i: g.astype(jnp.float32) for i, g in jax.grad(terms)(shifted).items()}
