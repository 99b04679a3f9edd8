"""Per-example functions whose vmap holds no convolution of two batched operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.convolution import convolve
from cabs_jax.statistics import PyTree

CONVOLUTION = "conv_general_dilated"

Marked = tuple[Any, bool]  # a value, and whether it depends on the examples


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
            pairs = _evaluate(closed.jaxpr, closed.consts, values, batched)
            outputs = [value for value, _ in pairs]
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
) -> list[Marked]:
    """Evaluates a jaxpr whose inputs depend on the examples, or not."""
    inputs = list(zip(values, batched, strict=True))
    return jaxprs.walk(jaxpr, consts, inputs, jaxpr.eqns, _evaluate_equation, lambda c: (c, False))


def _evaluate_equation(equation: jaxprs.Equation, operands: list[Marked]) -> list[Marked]:
    primitive = jaxprs.name(equation)
    values, batched = [value for value, _ in operands], [flag for _, flag in operands]
    if convolves(equation) and primitive in jaxprs.INLINED:
        return _evaluate(*jaxprs.inner_jaxpr(equation), values, batched)
    if primitive == CONVOLUTION and all(batched):
        outputs = [convolve(*values, **equation.params)]
    elif primitive == CONVOLUTION or not convolves(equation):
        outputs = jaxprs.evaluate(equation, values)
    elif primitive in CONTROL_FLOW:
        outputs = CONTROL_FLOW[primitive](equation, values)
    else:
        raise NotImplementedError(
            f"a convolution inside {primitive!r} cannot be rewritten for per-example gradients;"
            " move it out of that construct, or please report it."
        )
    return [(output, any(batched)) for output in outputs]


def _rewritten(closed: Any) -> Callable[..., list[Any]]:
    """The function of a closed jaxpr, as if all of its inputs depended on the examples."""
    jaxpr, consts = jaxprs.open_jaxpr(closed)
    return lambda *args: [value for value, _ in _evaluate(jaxpr, consts, args, [True] * len(args))]


def _cond(equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
    outputs: list[Any] = lax.switch(
        values[0], [_rewritten(branch) for branch in equation.params["branches"]], *values[1:]
    )
    return outputs


def _while(equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    test, body = _rewritten(params["cond_jaxpr"]), _rewritten(params["body_jaxpr"])
    of_test = params["cond_nconsts"]
    of_body = of_test + params["body_nconsts"]
    outputs: list[Any] = lax.while_loop(
        lambda state: test(*values[:of_test], *state)[0],
        lambda state: body(*values[of_test:of_body], *state),
        values[of_body:],
    )
    return outputs


def _scan(equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
    consts, carry, xs = jaxprs.split_scan(equation, values)
    body, params = _rewritten(equation.params["jaxpr"]), equation.params

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(*consts, *state, *x)
        return out[: len(state)], out[len(state) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    state, ys = lax.scan(step, carry, xs, **options)
    return [*state, *ys]


CONTROL_FLOW: dict[str, Callable[[jaxprs.Equation, list[Any]], list[Any]]] = {
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
