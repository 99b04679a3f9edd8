"""Sites that no rule covers: their own derivative, taken example by example.

As at any site, a `jax.custom_vjp` returns what is wanted in the place of a slot (see `site_vjps`):
here the gradients of the examples themselves. Its forward pass keeps what the derivative of the
equation needs of each example, and once for all what is made of parameters alone. So every
example goes forward and back once, by custom derivative rules if there are any.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored.sorted_loss import Site
from cabs_jax.moments.factored.values import (
    Batched,
    Sample,
    Shared,
    Value,
    evaluate_batched,
    slot_dtype,
)
from cabs_jax.moments.rewriting import without_batched_convolutions


def evaluate_by_derivative(sample: Sample, site: Site, values: list[Value]) -> list[Batched]:
    """Evaluates an equation in which parameters meet the example, without a rule for it.

    The operands are sorted, by place, into the parameters to be measured, what else is the same
    for all examples, and what is the example's own.
    """
    equation = site.equation
    slots = {i: v.gradient_slots for i, _ in site.parameters if isinstance(v := values[i], Shared)}
    parameters = {i: values[i].value for i in slots}
    fixed = {i: v.value for i, v in enumerate(values) if isinstance(v, Shared) and i not in slots}
    examples = {i: v.value for i, v in enumerate(values) if isinstance(v, Batched)}
    smooth = [i for i, x in examples.items() if jnp.issubdtype(x.dtype, jnp.inexact)]
    floating = [jaxprs.carries_gradient(v) for v in equation.outvars]

    def of_one(shared: Any, example: Any) -> tuple[list[Any], Any]:
        """The outputs of one example, and what pulls cotangents back through the equation."""
        parameters, fixed = shared

        def function(parameters: Any, smoothly: Any) -> tuple[list[Any], list[Any]]:
            operands = fixed | example | parameters | smoothly
            outputs = jaxprs.evaluate(equation, [operands[i] for i in range(len(operands))])
            floats = [x for x, smooth in zip(outputs, floating, strict=True) if smooth]
            return floats, outputs

        own = {i: example[i] for i in smooth}
        _, pull, outputs = jax.vjp(function, parameters, own, has_aux=True)
        return outputs, pull

    shared = parameters, fixed
    closed, tree = jaxprs.trace(of_one, shared, jaxprs.first(examples))
    count, known = len(floating), len(jax.tree.leaves(shared))
    depends = jaxprs.dependent(closed.jaxpr, range(known, len(closed.jaxpr.invars)))
    own = [True] * count + depends[count:]

    @jax.custom_vjp
    def apply(parameters: Any, fixed: Any, examples: Any, slots: Any) -> list[Any]:
        operands: dict[int, Value] = {i: Batched(x) for i, x in examples.items()}
        operands |= {i: Shared(x) for i, x in (parameters | fixed).items()}
        values = [operands[i] for i in range(len(operands))]
        return [output.value for output in evaluate_batched(sample, equation, values)]

    def forward(parameters: Any, fixed: Any, examples: Any, slots: Any) -> tuple[list[Any], Any]:
        def chosen(wanted: bool, shared: Any, example: Any) -> list[Any]:
            """What depends on the example, or what does not."""
            jaxpr, used = jaxprs.needed(closed.jaxpr, [flag == wanted for flag in own])
            given = zip(jax.tree.leaves((shared, example)), used, strict=True)
            function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))
            outputs: list[Any] = function(*(x for x, needed in given if needed))
            return outputs

        shared = parameters, fixed
        of_examples = without_batched_convolutions(lambda *given: chosen(True, *given))
        found = sample.target.vmap(of_examples, (None, 0))(shared, examples)
        of_all = chosen(False, shared, jaxprs.first(examples))
        return found[:count], (found[count:], of_all, examples)

    def pull_one(of_all: list[Any], of_example: list[Any], cotangents: list[Any]) -> Any:
        """The cotangents of the parameters and of the smooth operands, for one example."""
        parts = {True: iter(of_example), False: iter(of_all)}
        saved = [next(parts[flag]) for flag in own[count:]]
        _, pull = jax.tree.unflatten(tree, [*[0] * count, *saved])
        return pull(cotangents)

    def backward(saved: Any, cotangents: Any) -> tuple[Any, Any, Any, Any]:
        of_examples, of_all, examples = saved
        floats = [c for c, smooth in zip(cotangents, floating, strict=True) if smooth]
        pull = sample.target.vmap(without_batched_convolutions(pull_one), (None, 0, 0))
        gradients, into_smooth = pull(of_all, of_examples, floats)  # g: (m, *w.shape)
        # As in `site_vjps._gradients`, the sum over the slots will be the gradient of the batch.
        into_parameters = jax.tree.map(jnp.zeros_like, parameters)
        into_examples = {i: into_smooth.get(i) for i in examples}
        into_slots = {i: g.astype(slot_dtype(g.dtype)) for i, g in gradients.items()}
        return into_parameters, None, into_examples, into_slots

    apply.defvjp(forward, backward)
    return [Batched(output) for output in apply(parameters, fixed, examples, slots)]
