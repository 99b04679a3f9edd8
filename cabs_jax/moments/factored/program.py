"""Where the parameters of a per-example loss meet the example.

`plan` walks the jaxpr of `loss_fn(params, example)` once and sorts its equations. What depends on
the example differs from one example to the next; what depends on the parameters alone is the same
for all. An equation that takes some of both is a *site*: the gradient of a parameter is the sum of
what comes back from its sites. The walk goes into jit, checkpoint and scan; anything else that
holds a jaxpr is one equation to it.

A term of the loss that depends on parameters alone, such as a penalty on their norm, is no site: it
adds the same to the gradient of every example, which moves their mean and leaves their variance.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import primitives, views


class Parameter(NamedTuple):
    """What is known of a value that depends on parameters alone.

    Attributes:
      leaves: The parameters it depends on.
      view: How it looks at the only one, where it does no more than look.
    """

    leaves: frozenset[int]
    view: views.View | None


class Example:
    """Marks a value that depends on the example."""


class Constant:
    """Marks a value that depends on neither, or through which no gradient flows."""


EXAMPLE, CONSTANT = Example(), Constant()
Origin = Parameter | Example | Constant


class Kind(enum.Enum):
    """How an equation is evaluated for a batch."""

    PLAIN = enum.auto()  # as it is, vmapped over what depends on the example
    SITE = enum.auto()  # parameters meet the example
    SHIFT = enum.auto()  # parameters add the same to the loss of every example
    CALL = enum.auto()  # walk into the jaxpr inside
    CHECKPOINT = enum.auto()  # walk into it, and keep it rematerialised
    SCAN = enum.auto()  # walk into its body


class Step(NamedTuple):
    """One equation of a program.

    Attributes:
      kind: How it is evaluated.
      equation: The equation.
      inner: The program inside it.
      site: Its number, if it is a site.
      leaves: The parameters that a shift depends on.
    """

    kind: Kind
    equation: jaxprs.Equation
    inner: Program | None = None
    site: int = -1
    leaves: frozenset[int] = frozenset()


class Program(NamedTuple):
    """A jaxpr whose equations are sorted.

    Attributes:
      jaxpr: The jaxpr.
      consts: Values of its constants.
      steps: Its equations in order.
      inputs: The origin of each input.
      outputs: The origin of each output.
    """

    jaxpr: jaxprs.Jaxpr
    consts: Sequence[Any]
    steps: tuple[Step, ...]
    inputs: tuple[Origin, ...]
    outputs: tuple[Origin, ...]


class Site(NamedTuple):
    """A place where parameters meet the example.

    Attributes:
      equation: The equation; the scan that it starts, or None, for a parameter that becomes a
        value of the example's (a carry, a loss).
      weights: For each operand that depends on parameters alone: its place and origin.
      rule: The rule of the equation's primitive, if it has one for this operand.
      depth: Lengths of the scans around it.
    """

    equation: jaxprs.Equation
    weights: tuple[tuple[int, Parameter], ...]
    rule: primitives.Rule | None
    depth: tuple[int, ...]


class Plan(NamedTuple):
    """The sorted per-example loss."""

    program: Program
    sites: tuple[Site, ...]


def plan(closed: Any, num_params: int, differentiable: Sequence[bool]) -> Plan:
    """Sorts the jaxpr of `loss_fn(params, example)`.

    Args:
      closed: Closed jaxpr; its first `num_params` inputs are the leaves of the parameters.
      num_params: Number of parameter leaves.
      differentiable: Which of them a gradient is wanted for.
    """
    jaxpr, consts = jaxprs.open_jaxpr(closed)
    origins: list[Origin] = [
        Parameter(frozenset([leaf]), views.whole(leaf, var.aval.shape))
        if differentiable[leaf]
        else CONSTANT
        for leaf, var in enumerate(jaxpr.invars[:num_params])
    ]
    origins += [EXAMPLE] * (len(jaxpr.invars) - num_params)
    sites: list[Site] = []
    program = _walk(jaxpr, consts, tuple(origins), (), sites, (True,))
    sites += _copies(None, program.outputs[:1], ())
    return Plan(program, tuple(sites))


def shifting(program: Program) -> frozenset[int]:
    """The parameters that add the same to the loss of every example."""
    return frozenset[int]().union(
        *(step.leaves for step in program.steps),
        *(shifting(step.inner) for step in program.steps if step.inner),
    )


def _walk(
    jaxpr: jaxprs.Jaxpr,
    consts: Sequence[Any],
    inputs: tuple[Origin, ...],
    depth: tuple[int, ...],
    sites: list[Site],
    summed: tuple[bool, ...] = (),
) -> Program:
    """Sorts a jaxpr; `summed` tells which of its first outputs are terms of the loss."""
    terms = _terms(jaxpr, summed)
    known: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, CONSTANT)
    known |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: jaxprs.Atom) -> Origin:
        return CONSTANT if jaxprs.is_literal(atom) else known[atom]

    steps = []
    for equation in jaxpr.eqns:
        origins = tuple(map(read, equation.invars))
        summed = tuple(var in terms for var in equation.outvars)
        step, outputs = _sort(equation, origins, depth, sites, summed)
        steps.append(step)
        for var, origin in zip(equation.outvars, outputs, strict=True):
            known[var] = origin if _carries_gradient(var) or origin is EXAMPLE else CONSTANT
    return Program(jaxpr, consts, tuple(steps), inputs, tuple(map(read, jaxpr.outvars)))


def _sort(
    equation: jaxprs.Equation,
    origins: tuple[Origin, ...],
    depth: tuple[int, ...],
    sites: list[Site],
    summed: tuple[bool, ...],
) -> tuple[Step, Sequence[Origin]]:
    """Sorts one equation; returns its step and where its outputs come from."""
    everything, kind = len(equation.outvars), jaxprs.name(equation)
    weights = tuple((i, o) for i, o in enumerate(origins) if isinstance(o, Parameter))
    if weights and kind in jaxprs.CALLS:
        inner, consts = jaxprs.inner_jaxpr(equation)
        program = _walk(inner, consts, origins, depth, sites, summed)
        return Step(Kind.CALL, equation, program), program.outputs
    if EXAMPLE not in origins:
        return Step(Kind.PLAIN, equation), _from_parameters(equation, [w for _, w in weights])
    if not weights or not any(map(_carries_gradient, equation.outvars)):
        return Step(Kind.PLAIN, equation), [EXAMPLE] * everything
    if kind == "add" and any(summed) and len(weights) == 1:
        return Step(Kind.SHIFT, equation, leaves=weights[0][1].leaves), [EXAMPLE]
    if kind in jaxprs.CHECKPOINTS:
        inner, consts = jaxprs.inner_jaxpr(equation)
        program = _walk(inner, consts, origins, depth, sites)
        return Step(Kind.CHECKPOINT, equation, program), program.outputs
    if kind == "scan":
        return _sort_scan(equation, origins, depth, sites)
    rule = primitives.find_rule(equation, weights[0][0]) if len(weights) == 1 else None
    sites.append(Site(equation, weights, rule, depth))
    return Step(Kind.SITE, equation, site=len(sites) - 1), [EXAMPLE] * everything


def _terms(jaxpr: jaxprs.Jaxpr, summed: tuple[bool, ...]) -> set[Any]:
    """Variables that enter the loss as terms of a sum and are used for nothing else."""
    outputs = jaxpr.outvars[: len(summed)]
    read = [*outputs, *(v for equation in jaxpr.eqns for v in equation.invars)]
    uses = Counter(v for v in read if not jaxprs.is_literal(v))
    candidates = [v for v, term in zip(outputs, summed, strict=True) if term]
    terms = {v for v in candidates if not jaxprs.is_literal(v) and uses[v] == 1}
    for equation in reversed(jaxpr.eqns):
        if jaxprs.name(equation) == "add" and equation.outvars[0] in terms:
            operands = [v for v in equation.invars if not jaxprs.is_literal(v)]
            terms |= {v for v in operands if uses[v] == 1}
    return terms


def _from_parameters(equation: jaxprs.Equation, weights: list[Parameter]) -> list[Origin]:
    if not weights or jaxprs.name(equation) == "stop_gradient":
        return [CONSTANT] * len(equation.outvars)
    leaves = frozenset[int]().union(*(weight.leaves for weight in weights))
    seen: Sequence[views.View | None] | None = None
    if len(weights) == 1 and weights[0].view is not None and len(equation.invars) == 1:
        seen = views.through(weights[0].view, equation)
    return [Parameter(leaves, view) for view in seen or [None] * len(equation.outvars)]


def _sort_scan(
    equation: jaxprs.Equation,
    origins: tuple[Origin, ...],
    depth: tuple[int, ...],
    sites: list[Site],
) -> tuple[Step, list[Origin]]:
    body, body_consts = jaxprs.open_jaxpr(equation.params["jaxpr"])
    length = equation.params["length"]
    consts, carry, xs = jaxprs.split_scan(equation, origins)
    consts = [_repeated(origin, length) for origin in consts]
    xs = [_stepped(origin) for origin in xs]
    # A parameter that starts a carry becomes a value of its own, different for every example.
    carry = [EXAMPLE if isinstance(origin, Parameter) else origin for origin in carry]
    while True:
        trial: list[Site] = []
        inputs = (*consts, *carry, *xs)
        program = _walk(body, body_consts, inputs, (*depth, length), trial)
        after = [
            CONSTANT if old is CONSTANT and new is CONSTANT else EXAMPLE
            for old, new in zip(carry, program.outputs, strict=False)
        ]
        if after == carry:
            break
        carry = after
    program = _renumbered(program, len(sites))
    sites += trial
    _, starts, _ = jaxprs.split_scan(equation, origins)
    sites += _copies(equation, starts, depth)
    sites += _copies(equation, program.outputs, (*depth, length))
    stacked = [
        CONSTANT if origin is CONSTANT else EXAMPLE for origin in program.outputs[len(carry) :]
    ]
    return Step(Kind.SCAN, equation, program), [*carry, *stacked]


def _copies(
    equation: jaxprs.Equation, origins: Sequence[Origin], depth: tuple[int, ...]
) -> list[Site]:
    """Sites for parameters of which every example is given a copy of its own."""
    return [
        Site(equation, ((i, origin),), None, depth)
        for i, origin in enumerate(origins)
        if isinstance(origin, Parameter)
    ]


def _repeated(origin: Origin, length: int) -> Origin:
    if not isinstance(origin, Parameter) or origin.view is None:
        return origin
    return origin._replace(view=origin.view._replace(repeats=origin.view.repeats * length))


def _stepped(origin: Origin) -> Origin:
    if not isinstance(origin, Parameter) or origin.view is None:
        return origin
    return origin._replace(view=views.scanned(origin.view))


def _renumbered(program: Program, offset: int) -> Program:
    steps = [
        step._replace(
            site=step.site + offset if step.site >= 0 else -1,
            inner=_renumbered(step.inner, offset) if step.inner else None,
        )
        for step in program.steps
    ]
    return program._replace(steps=tuple(steps))


def _carries_gradient(var: jaxprs.Atom) -> bool:
    return bool(jnp.issubdtype(var.aval.dtype, jnp.inexact))
