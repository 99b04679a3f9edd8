"""Where the parameters of a per-example loss meet the example.

`trace_program` traces `loss_fn(params, example)` for one example and sorts the equations of its
jaxpr by what they depend on. What depends on the example differs from one example to the next; what
depends on the parameters alone is the same for all. An equation that takes some of both is a
*site*: by the chain rule, the gradient of a parameter is the sum of what comes back from its sites.
The walk goes into jit, checkpoint and scan; anything else that holds a jaxpr (cond, while, a custom
derivative rule) is one equation to it.

A term of the loss that depends on parameters alone, such as a penalty on their norm, is no site: it
adds the same to the gradient of every example, which moves their mean and leaves their variance. It
is a *shift*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import distributed, primitives, views
from cabs_jax.moments.factored.sorted_loss import (
    CONSTANT,
    EXAMPLE,
    POOLED,
    Example,
    Kind,
    Met,
    Origin,
    Parameter,
    Picked,
    Program,
    Site,
    SortedJaxpr,
    Step,
)
from cabs_jax.statistics import PyTree


def trace_program(loss_fn: Callable[..., Any], params: PyTree, batch: PyTree) -> Program:
    """Traces `loss_fn(params, example)`, whose first output is the loss, and sorts it.

    Args:
      loss_fn: The per-example loss.
      params: Its parameters; arrays that are not floating-point count as constants.
      batch: Examples with a leading axis, or `ShapeDtypeStruct`s of them.
    """
    closed, out_tree = distributed.trace(loss_fn, params, jaxprs.first(batch))
    jaxpr, consts = jaxprs.open_jaxpr(closed)
    jaxpr, leaves = jaxprs.without_dead_code(jaxpr), jax.tree.leaves(params)
    origins: list[Origin] = [
        Parameter(frozenset([i]), views.whole(i, jnp.shape(leaf)))
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        else CONSTANT
        for i, leaf in enumerate(leaves)
    ]
    origins += [EXAMPLE] * (len(jaxpr.invars) - len(leaves))
    sites: list[Site] = []
    body = _walk(jaxpr, consts, tuple(origins), (), sites, (True,))
    _use(body.outputs, sites)
    sites += _copies(None, body.outputs[:1], ())
    return Program(body, tuple(map(_pooled, sites)), out_tree)


def _walk(
    jaxpr: jaxprs.Jaxpr,
    consts: Sequence[Any],
    inputs: tuple[Origin, ...],
    scans: tuple[int, ...],
    sites: list[Site],
    summed: tuple[bool, ...] = (),
    counted: Sequence[jaxprs.Equation] = (),
) -> SortedJaxpr:
    """Sorts a jaxpr and appends its sites to `sites`.

    `summed` tells which of its first outputs enter the loss as terms of a sum, `counted` which of
    its equations take entries of parameters in turn, the jaxpr being the body of a scan.
    """
    terms = jaxprs.terms(jaxpr, summed)
    steps: list[Step] = []

    def visit(equation: jaxprs.Equation, origins: list[Origin]) -> list[Origin]:
        summed = tuple(var in terms for var in equation.outvars)
        step, outputs = _sort(equation, tuple(origins), scans, sites, summed)
        if step.kind is Kind.VIEW and any(equation is one for one in counted):
            outputs = [
                _within_scan(o, lambda v: views.taken_in_turn(v, scans[-1])) for o in outputs
            ]
        steps.append(step)
        return [
            origin if isinstance(origin, Example) or jaxprs.carries_gradient(var) else CONSTANT
            for var, origin in zip(equation.outvars, outputs, strict=True)
        ]

    outputs = jaxprs.walk(jaxpr, consts, inputs, jaxpr.eqns, visit, lambda _: CONSTANT)
    return SortedJaxpr(jaxpr, consts, tuple(steps), inputs, tuple(outputs))


def _sort(
    equation: jaxprs.Equation,
    origins: tuple[Origin, ...],
    scans: tuple[int, ...],
    sites: list[Site],
    summed: tuple[bool, ...],
) -> tuple[Step, Sequence[Origin]]:
    """Sorts one equation; returns its step and where its outputs come from."""
    primitive, of_example = jaxprs.name(equation), [EXAMPLE] * len(equation.outvars)
    parameters = tuple((i, o) for i, o in enumerate(origins) if isinstance(o, Parameter))
    picked = any(isinstance(o, Picked) for o in origins)
    if (parameters or picked) and primitive in jaxprs.CALLS:
        inner = _walk(*jaxprs.inner_jaxpr(equation), origins, scans, sites, summed)
        return Step(Kind.CALL, equation, inner), inner.outputs
    if picked:
        return _sort_picked(equation, origins, scans, sites, summed)
    if not any(isinstance(o, Example) for o in origins):
        return _sort_shared(equation, parameters)
    if primitive == "broadcast_in_dim":
        return Step(Kind.PLAIN, equation), [Example(primitives.spread_along(equation))]
    if not parameters or not any(map(jaxprs.carries_gradient, equation.outvars)):
        return Step(Kind.PLAIN, equation), of_example
    if primitive == "add" and any(summed) and len(parameters) == 1:
        return Step(Kind.SHIFT, equation, leaves=parameters[0][1].leaves), of_example
    if primitive in jaxprs.CHECKPOINTS:
        inner = _walk(*jaxprs.inner_jaxpr(equation), origins, scans, sites)
        return Step(Kind.CHECKPOINT, equation, inner), inner.outputs
    if primitive == "scan":
        return _sort_scan(equation, origins, scans, sites)
    rule = primitives.find_rule(equation, parameters[0][0]) if len(parameters) == 1 else None
    number = len(sites)
    sites.append(Site(equation, parameters, rule, scans))
    step = Step(Kind.SITE, equation, site=number)
    if rule is None or not rule.one_hot or (rule.apart and not primitives.picks(equation, rule)):
        return step, of_example
    return step, [Picked(number, None if rule.apart else rule.rows)]


def _sort_picked(
    equation: jaxprs.Equation,
    origins: tuple[Origin, ...],
    scans: tuple[int, ...],
    sites: list[Site],
    summed: tuple[bool, ...],
) -> tuple[Step, Sequence[Origin]]:
    """Sorts an equation that is given what was picked from parameters."""
    of_example = tuple(EXAMPLE if isinstance(o, Picked) else o for o in origins)
    step, outputs = _sort(equation, of_example, scans, sites, summed)
    places = [i for i, o in enumerate(origins) if isinstance(o, Picked)]
    if step.kind is not Kind.PLAIN:
        _use(origins, sites)
        return step, outputs
    differing = [_differing(v, o) for v, o in zip(equation.invars, origins, strict=True)]
    uses: dict[int, Met] = {}
    known: list[tuple[int, int]] = []
    alone = len(places) == 1
    for place in places:
        origin = origins[place]
        assert isinstance(origin, Picked)
        if origin.rows is None:
            if alone and views.rearranges(equation, place):
                return step, [origin]
            rule = primitives.find_rule(equation, place)
            if rule is not None and not rule.one_hot and rule.positions == 1:
                uses[place] = rule
                known.append((place, origin.site))
        elif alone and primitives.adds_rows(equation, place, origin.rows):
            uses[place] = POOLED
        elif alone:
            rows = primitives.rows_after(equation, place, origin.rows, differing)
            if rows is not None:
                return step, [origin._replace(rows=rows)]
    _use(origins, sites, uses)
    return step._replace(picked=tuple(known)), outputs


def _differing(var: Any, origin: Origin) -> frozenset[int]:
    """Axes along which a value may differ."""
    alike = origin.alike if isinstance(origin, Example) else ()
    return frozenset(a for a, size in enumerate(var.aval.shape) if size > 1).difference(alike)


def _use(origins: Sequence[Origin], sites: list[Site], uses: dict[int, Met] | None = None) -> None:
    """Notes, where values were picked from parameters, that they are used, and how."""
    for i, origin in enumerate(origins):
        if isinstance(origin, Picked):
            site = sites[origin.site]
            sites[origin.site] = site._replace(met=(*site.met, (uses or {}).get(i)))


def _pooled(site: Site) -> Site:
    """A site whose rule knows whether all that is looked up there is added up."""
    if site.rule is None or site.met != (POOLED,):
        return site
    return site._replace(rule=site.rule._replace(pooled=True))


def _sort_shared(
    equation: jaxprs.Equation, parameters: tuple[tuple[int, Parameter], ...]
) -> tuple[Step, Sequence[Origin]]:
    """Sorts an equation that no example enters."""
    if not parameters or jaxprs.name(equation) == "stop_gradient":
        return Step(Kind.PLAIN, equation), [CONSTANT] * len(equation.outvars)
    leaves = frozenset[int]().union(*(parameter.leaves for _, parameter in parameters))
    seen = {place: p.view for place, p in parameters if p.view is not None}
    if len(seen) == len(parameters):
        operands = [seen.get(place) for place in range(len(equation.invars))]
        found = views.through(operands, equation)
        if found is not None:
            step = Step(Kind.VIEW, equation, viewed=tuple(seen))
            return step, [Parameter(leaves, view) for view in found]
    return Step(Kind.PLAIN, equation), [Parameter(leaves, None)] * len(equation.outvars)


def _sort_scan(
    equation: jaxprs.Equation,
    origins: tuple[Origin, ...],
    scans: tuple[int, ...],
    sites: list[Site],
) -> tuple[Step, list[Origin]]:
    """Sorts a scan: its body, and the parameters that become values of its carry."""
    consts, starts, xs = jaxprs.split_scan(equation, origins)
    within = (*scans, equation.params["length"])
    consts = [_within_scan(origin, lambda v: views.repeated(v, within[-1])) for origin in consts]
    xs = [_within_scan(origin, views.scanned) for origin in xs]
    # A parameter that starts a carry becomes a value of its own, different for every example.
    carry = [CONSTANT if origin is CONSTANT else EXAMPLE for origin in starts]
    body, found = _sort_body(equation, consts, carry, xs, within, sites)
    # What one step makes depend on the example, the next one is given: until nothing is added.
    while (after := _merged(carry, body.outputs)) != carry:
        carry = after
        body, found = _sort_body(equation, consts, carry, xs, within, sites)
    sites[:] = found
    _use(body.outputs, sites)
    sites += _copies(equation, starts, scans)
    sites += _copies(equation, body.outputs, within)
    stacked = [CONSTANT if origin is CONSTANT else EXAMPLE for origin in body.outputs[len(carry) :]]
    return Step(Kind.SCAN, equation, body), [*carry, *stacked]


def _sort_body(
    equation: jaxprs.Equation,
    consts: list[Origin],
    carry: list[Origin],
    xs: list[Origin],
    scans: tuple[int, ...],
    sites: list[Site],
) -> tuple[SortedJaxpr, list[Site]]:
    """Sorts the body of a scan for a guess of its carry; returns it and the sites so far."""
    found = list(sites)
    jaxpr, consts_of_body = jaxprs.open_jaxpr(equation.params["jaxpr"])
    inputs, counted = (*consts, *carry, *xs), jaxprs.counted_slices(equation)
    return _walk(jaxpr, consts_of_body, inputs, scans, found, counted=counted), found


def _merged(carry: list[Origin], outputs: tuple[Origin, ...]) -> list[Origin]:
    """What a carry depends on after one more step; once on the example, always on it."""
    pairs = zip(carry, outputs, strict=False)
    return [CONSTANT if old is CONSTANT and new is CONSTANT else EXAMPLE for old, new in pairs]


def _copies(
    equation: jaxprs.Equation, origins: Sequence[Origin], scans: tuple[int, ...]
) -> list[Site]:
    """Sites for parameters of which every example is given a copy of its own."""
    return [
        Site(equation, ((i, origin),), None, scans)
        for i, origin in enumerate(origins)
        if isinstance(origin, Parameter)
    ]


def _within_scan(origin: Origin, look: Callable[[views.Seen], views.Seen]) -> Origin:
    """The origin of an operand of a scan, as one step of its body sees it."""
    if isinstance(origin, Example):
        return EXAMPLE
    if not isinstance(origin, Parameter) or origin.view is None:
        return origin
    return origin._replace(view=look(origin.view))
