"""Per-example functions whose vmap holds no convolution of two batched operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.convolution import convolve

PyTree = Any
CONVOLUTION = "conv_general_dilated"


def without_batched_convolutions(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Makes `function(params, *examples)` safe to vmap over the examples, sharded or not.

    Convolutions whose operands both depend on the examples become patches and a matrix product;
    all else is evaluated as it stands. The result must not be differentiated further: custom
    derivative rules inside it are gone.
    """

    def rewritten(params: PyTree, *examples: PyTree) -> PyTree:
        closed, out_tree = jaxprs.trace(function, params, *examples)
        values = jax.tree.leaves((params, *examples))
        if jaxprs.contains(closed.jaxpr, CONVOLUTION):
            shared = len(jax.tree.leaves(params))
            batched = [False] * shared + [True] * (len(values) - shared)
            outputs, _ = _evaluate(closed.jaxpr, closed.consts, values, batched)
        else:
            outputs = jax.extend.core.jaxpr_as_fun(closed)(*values)
        return jax.tree.unflatten(out_tree, outputs)

    return rewritten


def convolves(equation: jaxprs.Equation) -> bool:
    """Whether an equation is a convolution, or holds one."""
    return jaxprs.name(equation) == CONVOLUTION or any(
        jaxprs.contains(inner, CONVOLUTION) for inner in jaxprs.subjaxprs(equation)
    )


def _evaluate(
    jaxpr: jaxprs.Jaxpr, consts: Sequence[Any], values: Sequence[Any], batched: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Evaluates a jaxpr; returns its outputs and which of them depend on the examples."""
    known = dict(zip(jaxpr.constvars, ((c, False) for c in consts), strict=True))
    known |= dict(zip(jaxpr.invars, zip(values, batched, strict=True), strict=True))

    def read(atom: jaxprs.Atom) -> tuple[Any, bool]:
        return (atom.val, False) if jaxprs.is_literal(atom) else known[atom]

    for equation in jaxpr.eqns:
        inputs, flags = (
            zip(*map(read, equation.invars), strict=True) if equation.invars else ((), ())
        )
        outputs, out_flags = _evaluate_equation(equation, list(inputs), list(flags))
        known |= dict(zip(equation.outvars, zip(outputs, out_flags, strict=True), strict=True))
    results = [read(atom) for atom in jaxpr.outvars]
    return [value for value, _ in results], [flag for _, flag in results]


def _evaluate_equation(
    equation: jaxprs.Equation, values: list[Any], batched: list[bool]
) -> tuple[list[Any], list[bool]]:
    kind, params = jaxprs.name(equation), equation.params
    everything = [any(batched)] * len(equation.outvars)
    if kind == CONVOLUTION and all(batched):
        return [convolve(*values, **params)], everything
    if kind == CONVOLUTION or not convolves(equation):
        return jaxprs.evaluate(equation, values), everything
    if kind in jaxprs.INLINED:
        return _evaluate(*jaxprs.inner_jaxpr(equation), values, batched)

    def rewritten(closed: Any) -> Callable[..., list[Any]]:
        inner, consts = jaxprs.open_jaxpr(closed)
        return lambda *args: _evaluate(inner, consts, args, [True] * len(args))[0]

    if kind == "cond":
        index, *operands = values
        branches = [rewritten(branch) for branch in params["branches"]]
        return lax.switch(index, branches, *operands), everything
    if kind == "while":
        test, body = rewritten(params["cond_jaxpr"]), rewritten(params["body_jaxpr"])
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test_consts, body_consts, carry = (
            values[: split[0]],
            values[split[0] : split[1]],
            values[split[1] :],
        )
        return lax.while_loop(
            lambda state: test(*test_consts, *state)[0],
            lambda state: body(*body_consts, *state),
            carry,
        ), everything
    if kind == "scan":
        consts, carry, xs = jaxprs.split_scan(equation, values)
        body = rewritten(params["jaxpr"])

        def step(state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            out = body(*consts, *state, *x)
            return out[: len(state)], out[len(state) :]

        state, ys = lax.scan(
            step,
            carry,
            xs,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*state, *ys], everything
    raise NotImplementedError(
        f"a convolution inside {kind!r} cannot be rewritten for per-example gradients; move it out"
        " of that construct, or please report it"
    )
