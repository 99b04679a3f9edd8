"""Evaluates a sorted per-example loss for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import views
from cabs_jax.moments.factored.program import CONSTANT, Kind, Program, Step
from cabs_jax.moments.factored.site_vjps import (
    Batched,
    Context,
    Shared,
    Value,
    evaluate_plain,
    evaluate_site,
    slot_dtype,
    to_batched,
)

PyTree = Any
REARRANGING = {
    "broadcast_in_dim",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "transpose",
}


def run(context: Context, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """Evaluates a program; its inputs and outputs are shared by the examples or batched."""
    constants = zip(program.jaxpr.constvars, map(Shared, program.consts), strict=True)
    known: dict[Any, Value] = dict(constants)
    known |= zip(program.jaxpr.invars, inputs, strict=True)

    def read(atom: jaxprs.Atom) -> Value:
        return Shared(atom.val) if jaxprs.is_literal(atom) else known[atom]

    for step in program.steps:
        outputs = _evaluate(context, step, [read(atom) for atom in step.equation.invars])
        known |= zip(step.equation.outvars, outputs, strict=True)
    return [read(atom) for atom in program.jaxpr.outvars]


def _evaluate(context: Context, step: Step, values: list[Value]) -> Sequence[Value]:
    equation, inner = step.equation, step.inner
    if step.kind is Kind.SITE:
        return evaluate_site(context, step.site, values)
    if step.kind is Kind.SHIFT:
        fixed = [Shared(lax.stop_gradient(v.value)) if isinstance(v, Shared) else v for v in values]
        return evaluate_plain(equation, fixed)
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
    if any(isinstance(value, Batched) for value in values):
        return evaluate_plain(equation, values)
    return _evaluate_shared(context, equation, [v for v in values if isinstance(v, Shared)])


def shift(
    context: Context, program: Program, inputs: Sequence[Shared | None]
) -> tuple[jax.Array, list[Shared | None]]:
    """Sums the terms of the loss that depend on parameters alone.

    Args:
      context: As for `run`.
      program: The program.
      inputs: The parameters' values, and None for what depends on the example.

    Returns:
      The sum, and those outputs of the program that depend on parameters alone.
    """
    total = jnp.zeros((), jnp.float32)
    known: dict[Any, Shared | None] = {
        var: Shared(const)
        for var, const in zip(program.jaxpr.constvars, program.consts, strict=True)
    }
    known |= zip(program.jaxpr.invars, inputs, strict=True)

    def read(atom: jaxprs.Atom) -> Shared | None:
        return Shared(atom.val) if jaxprs.is_literal(atom) else known[atom]

    for step in program.steps:
        values = [read(atom) for atom in step.equation.invars]
        given = [value for value in values if value is not None]
        outputs: list[Shared | None] = [None] * len(step.equation.outvars)
        if step.kind is Kind.CALL and step.inner is not None:
            more, outputs = shift(context, step.inner, values)
            total = total + more
        elif step.kind is Kind.SHIFT:
            total = total + sum(value.value for value in given).astype(jnp.float32)
        elif len(given) == len(values):
            outputs = list(_evaluate_shared(context, step.equation, given))
        known |= zip(step.equation.outvars, outputs, strict=True)
    return total, [read(atom) for atom in program.jaxpr.outvars]


def has_shift(program: Program) -> bool:
    """Whether the loss has terms that depend on parameters alone."""
    return any(
        step.kind is Kind.SHIFT or (step.inner is not None and has_shift(step.inner))
        for step in program.steps
    )


def _scan(
    context: Context, equation: jaxprs.Equation, program: Program, values: list[Value]
) -> list[Value]:
    """Scans a body whose steps see the whole batch, and the slots of their own."""
    consts, carry, xs = jaxprs.split_scan(equation, values)
    _, carry_origins, _ = jaxprs.split_scan(equation, program.inputs)
    outcomes = [*carry_origins, *program.outputs[len(carry) :]]
    slots = {n: context.collected[n] for n in _sites(program) if n in context.collected}

    def settle(outputs: list[Value]) -> list[Value]:
        return [
            _strong(output if origin is CONSTANT else to_batched(context, output))
            for output, origin in zip(outputs, outcomes, strict=False)
        ]

    def body(state: list[Value], scanned: PyTree) -> tuple[list[Value], list[Value]]:
        slices, collected = scanned
        outputs = settle(
            run(context._replace(collected=collected), program, [*consts, *state, *slices])
        )
        return outputs[: len(state)], outputs[len(state) :]

    state, ys = lax.scan(
        body,
        settle(carry),
        ([_swap_examples(x) for x in xs], slots),
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    return [*state, *map(_swap_examples, ys)]


def _swap_examples(value: Value) -> Value:
    """Swaps the axis of examples with that of a scan."""
    if isinstance(value, Batched):
        return Batched(value.value.swapaxes(0, 1))
    gradient_slots = None if value.gradient_slots is None else value.gradient_slots.swapaxes(0, 1)
    return value._replace(gradient_slots=gradient_slots)


def _strong(value: Value) -> Value:
    """Drops weak types, which would change from one step of a scan to the next."""
    x = value.value
    if not jax.typeof(x).weak_type:
        return value
    return value._replace(value=lax.convert_element_type(x, x.dtype))


def _sites(program: Program) -> list[int]:
    found = [step.site for step in program.steps if step.site >= 0]
    for step in program.steps:
        found += _sites(step.inner) if step.inner is not None else []
    return found


def _evaluate_shared(
    context: Context, equation: jaxprs.Equation, values: list[Shared]
) -> list[Shared]:
    """Evaluates an equation that no example enters, and hands its slots on."""
    outputs = jaxprs.evaluate(equation, [v.value for v in values])
    gradient_slots = [i for i, v in enumerate(values) if v.gradient_slots is not None]
    squares = [i for i, v in enumerate(values) if v.squares is not None]
    kind = jaxprs.name(equation)
    if kind == "stop_gradient" or not (gradient_slots or squares):
        return [Shared(output) for output in outputs]
    if kind == "convert_element_type" and _is_real(values[0].value) and _is_real(outputs[0]):
        return [values[0]._replace(value=outputs[0])]
    if len(values) == 1 and kind in views.IDENTITIES:
        return [values[0]._replace(value=outputs[0])]
    if len(values) == 1 and kind in REARRANGING:
        gradient_slots, square_slots = _rearranged(equation, values[0], len(outputs))
        return [Shared(*parts) for parts in zip(outputs, gradient_slots, square_slots, strict=True)]
    if not gradient_slots:
        return [Shared(output) for output in outputs]
    lifted = _lifted(context, equation, values, gradient_slots)
    return [Shared(output, slot) for output, slot in zip(outputs, lifted, strict=True)]


def _rearranged(
    equation: jaxprs.Equation, value: Shared, number: int
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Slots go through an equation that only moves entries as the entries do, in float32."""
    gradient_slots: Sequence[Any] = [None] * number
    squares: Sequence[Any] = [None] * number
    if value.gradient_slots is not None:
        gradient_slots = jax.vmap(lambda x: jaxprs.evaluate(equation, [x]))(value.gradient_slots)
    if value.squares is not None:
        squares = jaxprs.evaluate(equation, [value.squares])
    return gradient_slots, squares


def _lifted(
    context: Context, equation: jaxprs.Equation, values: list[Shared], gradient_slots: list[int]
) -> list[Any]:
    """Slots for the per-example gradients of a function of parameters.

    What comes back to them is pulled back, example by example, to the slots of its arguments.
    """
    floating = [i for i, o in enumerate(equation.outvars) if _is_floating(o.aval)]
    shapes = [equation.outvars[i].aval for i in floating]
    arguments = {i: values[i].value for i in gradient_slots}
    others = {i: v.value for i, v in enumerate(values) if i not in arguments}

    @jax.custom_vjp
    def slots(arguments: dict[int, Any], others: dict[int, Any], inner: Any) -> list[Any]:
        return [context.zeros((context.measured, *s.shape), slot_dtype(s.dtype)) for s in shapes]

    def forward(arguments: Any, others: Any, inner: Any) -> tuple[list[Any], Any]:
        return slots(arguments, others, inner), (arguments, others)

    def backward(saved: Any, cotangents: list[Any]) -> tuple[Any, Any, Any]:
        arguments, others = saved

        def function(arguments: dict[int, Any]) -> list[Any]:
            operands = arguments | others
            outputs = jaxprs.evaluate(equation, [operands[i] for i in range(len(operands))])
            return [outputs[i] for i in floating]

        _, pull = jax.vjp(function, arguments)
        cast = [c.astype(shape.dtype) for c, shape in zip(cotangents, shapes, strict=True)]
        (pulled,) = jax.vmap(pull)(cast)
        into_inner = {i: p.astype(slot_dtype(p.dtype)) for i, p in pulled.items()}
        return jax.tree.map(jnp.zeros_like, arguments), None, into_inner

    slots.defvjp(forward, backward)
    filled = slots(arguments, others, {i: values[i].gradient_slots for i in gradient_slots})
    by_output = dict(zip(floating, filled, strict=True))
    return [by_output.get(i) for i in range(len(equation.outvars))]


def _is_real(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _is_floating(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))
