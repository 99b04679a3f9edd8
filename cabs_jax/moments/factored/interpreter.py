"""Evaluates a sorted per-example loss for a whole batch.

The interpreter goes through the equations in order, as `jax.vmap` would, but keeps apart what is
the same for all examples (`Shared`) and what is not (`Batched`). So a parameter stays one array,
and is not copied for every example, until it meets the example at a site.

On its way there a parameter may be reshaped, sliced, cast, or squared: equations that no example
enters, evaluated once. Its slots have to come along, and what is put into them at the site has to
find its way back to the parameter itself:

* A view moves entries of parameters about, and may scale them. Slots are moved in the same way;
  JAX's own derivative of that moves their cotangents back.
* Any other function u = f(w) changes the gradient. Where gradients are held, the output is given
  new slots s, for those of the examples with respect to u; a derivative rule pulls each of them
  back through f on its own, g_i = f'(w)ᵀ ∂ℓ/∂s_i, into the slots of w. Where they are not, what is
  collected at the site is pulled back once all is over (see `pulled_back`).

The whole evaluation is differentiated once, by `batch_sums`. Checkpoints and scans stay what they
were, and custom derivative rules of the user's are evaluated as one equation and keep their effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored.picked import evaluate_product
from cabs_jax.moments.factored.site_vjps import evaluate_site
from cabs_jax.moments.factored.sorted_loss import CONSTANT, Kind, SortedJaxpr, Step
from cabs_jax.moments.factored.values import (
    Batched,
    Context,
    Sample,
    Shared,
    Value,
    evaluate_batched,
    slot_dtype,
    to_batched,
    whole,
)
from cabs_jax.moments.factored.viewing import evaluate_view
from cabs_jax.statistics import PyTree


def run(context: Context, body: SortedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    """Evaluates a sorted jaxpr; its inputs and outputs are shared by the examples or batched."""

    def visit(step: Step, values: list[Value]) -> Sequence[Value]:
        return _evaluate(context, step, values)

    return jaxprs.walk(body.jaxpr, body.consts, inputs, body.steps, visit, Shared)


def _evaluate(context: Context, step: Step, values: list[Value]) -> Sequence[Value]:
    equation, inner = step.equation, step.inner
    if step.kind is Kind.SITE and context.choices:
        return evaluate_site(context, step.site, values)
    if inner is not None and step.kind is Kind.CALL:
        return run(context, inner, values)
    if inner is not None and step.kind is Kind.CHECKPOINT:
        rematerialised = jax.checkpoint(
            lambda values: run(context, inner, values),
            prevent_cse=equation.params["prevent_cse"],
            policy=equation.params["policy"],
        )
        outputs: list[Value] = rematerialised(values)
        return outputs
    if inner is not None and step.kind is Kind.SCAN:
        return _scan(context, equation, inner, values)
    if step.kind is Kind.VIEW and (narrowed := _cast_in_parts(equation, values[0])):
        return [narrowed]
    values = [whole(value) for value in values]
    if step.kind is Kind.SHIFT:
        # Its gradient is the same for all examples, and is taken once, by `shift`.
        fixed = [Shared(lax.stop_gradient(v.value)) if isinstance(v, Shared) else v for v in values]
        return evaluate_batched(context.sample, equation, fixed)
    if step.picked and context.choices:
        return evaluate_product(context, step, values)
    if any(isinstance(value, Batched) for value in values):
        return evaluate_batched(context.sample, equation, values)
    shared = [v for v in values if isinstance(v, Shared)]
    if step.kind is Kind.VIEW:
        return evaluate_view(context.sample, equation, shared, step.viewed)
    return _evaluate_shared(context, equation, shared)


def _cast_in_parts(equation: jaxprs.Equation, value: Value) -> Shared | None:
    """A value of which every device holds a part, to be gathered in a narrower dtype."""
    if isinstance(value, Batched) or value.layout is None:
        return None
    dtype = equation.params.get("new_dtype")
    if jaxprs.name(equation) != "convert_element_type" or not jnp.issubdtype(dtype, jnp.floating):
        return None
    if dtype.itemsize >= value.layout.dtype.itemsize:
        return None
    return value._replace(layout=dataclasses.replace(value.layout, dtype=dtype))


def _scan(
    context: Context, equation: jaxprs.Equation, body: SortedJaxpr, values: list[Value]
) -> list[Value]:
    """Runs a scan for the whole batch: step t sees all examples.

    The factors of a site in the body differ from step to step, so their slots are scanned over,
    like the inputs of the scan. The slots of constants and the slot for norms are the same at
    every step, and add up.
    """
    consts, carry, xs = jaxprs.split_scan(equation, values)
    consts = [whole(value) for value in consts]  # once, and not at every step
    xs = [_by_step(value) for value in xs]
    _, carry_origins, _ = jaxprs.split_scan(equation, body.inputs)
    origins = [*carry_origins, *body.outputs[len(carry) :]]
    slots = {n: context.factors[n] for n in _numbers(body) if n in context.factors}

    def settle(outputs: list[Value]) -> list[Value]:
        # A scan wants its carry alike at every step: batched from the start if ever.
        return [
            output if origin is CONSTANT else to_batched(context.sample, output)
            for output, origin in zip(outputs, origins, strict=False)
        ]

    def step(state: list[Value], scanned: PyTree) -> tuple[list[Value], list[Value]]:
        slices, factors = scanned
        within = context._replace(factors=factors)
        outputs = settle(run(within, body, [*consts, *state, *map(_of_a_step, slices)]))
        return outputs[: len(state)], outputs[len(state) :]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    scanned = [_swap_examples(x) for x in xs], slots
    state, ys = lax.scan(step, settle(carry), scanned, **options)
    return [*state, *map(_swap_examples, ys)]


def _by_step(value: Value) -> Value:
    """Gathers what is split along the axis of a scan; anything else is gathered step by step."""
    if isinstance(value, Shared) and value.layout is not None and value.layout.axes[0]:
        return whole(value)
    return value


def _of_a_step(value: Value) -> Value:
    if isinstance(value, Shared) and value.layout is not None:
        return value._replace(layout=value.layout.of_a_step())
    return value


def _swap_examples(value: Value) -> Value:
    """Swaps the axis of examples with that of a scan: (m, steps, ...) and (steps, m, ...)."""
    if isinstance(value, Batched):
        return Batched(value.value.swapaxes(0, 1))
    if value.gradient_slots is not None:
        value = value._replace(gradient_slots=value.gradient_slots.swapaxes(0, 1))
    if value.scale is not None and not value.scale.ndim:  # the same at every step
        value = value._replace(scale=jnp.broadcast_to(value.scale, value.value.shape[:1]))
    return value


def _numbers(body: SortedJaxpr) -> list[int]:
    """The numbers of all sites in a sorted jaxpr."""
    found = [step.site for step in body.steps if step.site >= 0]
    return found + [n for step in body.steps if step.inner for n in _numbers(step.inner)]


def _evaluate_shared(
    context: Context, equation: jaxprs.Equation, values: list[Shared]
) -> list[Shared]:
    """Evaluates a function of parameters, and makes new slots if there are any for gradients."""
    outputs = jaxprs.evaluate(equation, [v.value for v in values])
    if jaxprs.name(equation) == "stop_gradient":
        return [Shared(output) for output in outputs]
    gradients = {i: v.gradient_slots for i, v in enumerate(values) if v.gradient_slots is not None}
    again = {i: v.again_slots for i, v in enumerate(values) if v.again_slots is not None}
    of_examples = _new_slots(context.sample, equation, values, gradients, of_examples=True)
    of_sums = _new_slots(context.sample, equation, values, again, of_examples=False)
    return [
        Shared(output, of_examples.get(i), again_slots=of_sums.get(i))
        for i, output in enumerate(outputs)
    ]


def _new_slots(
    sample: Sample,
    equation: jaxprs.Equation,
    values: list[Shared],
    inner: dict[int, jax.Array],
    *,
    of_examples: bool,
) -> dict[int, jax.Array]:
    """Slots for gradients with respect to a function u = f(w) of parameters, by output.

    What comes back to them is pulled back through f, into the slots of the arguments w. Nothing
    goes to w itself: where the gradients of the examples are held, that of the batch is their sum.

    Args:
      sample: The examples.
      equation: The function.
      values: What it is evaluated with.
      inner: The slots of its arguments, by place; without any, nothing is made.
      of_examples: Whether there is a gradient for each example, (m, *u.shape), or a sum of them.
    """
    if not inner:
        return {}
    floating = [i for i, v in enumerate(equation.outvars) if jaxprs.carries_gradient(v)]
    avals = [equation.outvars[i].aval for i in floating]
    arguments = {i: values[i].value for i in inner}
    others = {i: v.value for i, v in enumerate(values) if i not in inner}
    lead = (sample.examples,) if of_examples else ()

    @jax.custom_vjp
    def slots(arguments: dict[int, Any], others: dict[int, Any], inner: Any) -> list[Any]:
        return [sample.zeros((*lead, *aval.shape), slot_dtype(aval.dtype)) for aval in avals]

    def forward(arguments: Any, others: Any, inner: Any) -> tuple[list[Any], Any]:
        return slots(arguments, others, inner), (arguments, others)

    def backward(saved: Any, cotangents: list[Any]) -> tuple[Any, Any, Any]:
        arguments, others = saved
        _, pull = jax.vjp(lambda w: jaxprs.floating_outputs(equation, w | others), arguments)
        cast = [c.astype(aval.dtype) for c, aval in zip(cotangents, avals, strict=True)]
        (pulled,) = (sample.target.vmap(pull) if of_examples else pull)(cast)
        into_inner = {i: g.astype(slot_dtype(g.dtype)) for i, g in pulled.items()}
        return jax.tree.map(jnp.zeros_like, arguments), None, into_inner

    slots.defvjp(forward, backward)
    return dict(zip(floating, slots(arguments, others, inner), strict=True))
