"""Products with a sum of products of weights, multiplied out: x·(W + c·A·B) = x·W + c·(x·A)·B.

Of a weight that is computed, such as a merged low-rank update, the gradient of each example would
be formed and pulled back. Multiplied out, every weight meets the example in a product of its own,
whose norm follows from factors. That is done where it is less work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.statistics import PyTree


class Term(NamedTuple):
    """A matrix that is a product of others, times a scalar.

    Attributes:
      matrices: The matrices, in order.
      scale: The scalar, or None for 1.
    """

    matrices: tuple[Any, ...]
    scale: Any = None

    @property
    def transposed(self) -> Term:
        """The transpose of the matrix."""
        return Term(tuple(w.T for w in self.matrices[::-1]), self.scale)

    def times(self, scale: Any) -> Term:
        """The matrix times a scalar."""
        return self._replace(scale=scale if self.scale is None else self.scale * scale)


class Known(NamedTuple):
    """A value, and what is known of it.

    Attributes:
      value: The value.
      of_example: Whether it may depend on the example.
      of_params: Whether it may depend on parameters.
      terms: For a matrix of parameters alone, what adds up to it, one of these a product; else ().
    """

    value: Any
    of_example: bool = False
    of_params: bool = False
    terms: tuple[Term, ...] = ()


def trace(function: Callable[..., PyTree], params: PyTree, example: PyTree) -> tuple[Any, Any]:
    """Traces a per-example function, as `jaxprs.trace` does, with such products multiplied out."""
    closed, out_tree = jaxprs.trace(function, params, example)
    shared, changed = len(jax.tree.leaves(params)), False

    def run(jaxpr: jaxprs.Jaxpr, consts: Sequence[Any], inputs: Sequence[Known]) -> list[Known]:
        return jaxprs.walk(jaxpr, consts, inputs, jaxpr.eqns, visit, Known)

    def visit(equation: jaxprs.Equation, operands: list[Known]) -> list[Known]:
        nonlocal changed
        name, values = jaxprs.name(equation), [operand.value for operand in operands]
        of_example = any(operand.of_example for operand in operands)
        if name in jaxprs.CALLS:
            return run(*jaxprs.inner_jaxpr(equation), operands)
        if of_example and name == "scan":
            return _scan(run, equation, operands)
        if of_example and name in jaxprs.CHECKPOINTS:
            return _checkpoint(run, equation, operands)
        if of_example and name == "dot_general":
            product = _multiplied_out(equation, operands)
            if product is not None:
                changed = True
                return [Known(product, of_example=True)]
        of_params = any(operand.of_params for operand in operands)
        terms = _terms(equation, operands) if of_params and not of_example else ()
        outputs = jaxprs.evaluate(equation, values)
        return [Known(output, of_example, of_params, terms) for output in outputs]

    def rewritten(params: PyTree, example: PyTree) -> list[Any]:
        values = jax.tree.leaves((params, example))
        inputs = [Known(value, i >= shared, i < shared) for i, value in enumerate(values)]
        return [known.value for known in run(*jaxprs.open_jaxpr(closed), inputs)]

    values = jax.tree.leaves((params, example))
    of_params = [i < shared for i in range(len(values))]
    if not jaxprs.any_of_inputs_alone(closed, of_params, _multiplies):
        return closed, out_tree
    again, _ = jaxprs.trace(rewritten, params, example)
    return (again if changed else closed), out_tree


def _multiplies(equation: jaxprs.Equation) -> bool:
    """Whether an equation is the product of two matrices."""
    if jaxprs.name(equation) != "dot_general":
        return False
    (contracted, _), batch = equation.params["dimension_numbers"]
    matrices = all(v.aval.ndim == 2 for v in equation.invars)
    return matrices and len(contracted) == 1 and batch == ((), ())


def _terms(equation: jaxprs.Equation, operands: list[Known]) -> tuple[Term, ...]:
    """What adds up to the output of an equation of parameters, where it is a sum of products."""
    known, name = [operand.terms for operand in operands], jaxprs.name(equation)
    if _multiplies(equation):
        (left_axes, right_axes), _ = equation.params["dimension_numbers"]
        left, right = map(_single, operands)
        left = left if left_axes == (1,) else left.transposed
        right = right if right_axes == (0,) else right.transposed
        product = Term(left.matrices + right.matrices, left.scale)
        product = product if right.scale is None else product.times(right.scale)
        same = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
        return (product,) if len(same) == 1 else ()
    if not any(known):
        return ()
    if name in {"add", "sub"} and equation.invars[0].aval.shape == equation.invars[1].aval.shape:
        first, second = (operand.terms or (Term((operand.value,)),) for operand in operands)
        return first + (second if name == "add" else tuple(term.times(-1) for term in second))
    if name == "transpose":
        return tuple(term.transposed for term in known[0])
    if name == "neg":
        return tuple(term.times(-1) for term in known[0])
    if name == "mul":
        place = 0 if known[0] else 1
        scale = operands[1 - place].value
        if not jnp.ndim(scale):
            return tuple(term.times(scale) for term in known[place])
    if name == "div" and known[0] and not jnp.ndim(operands[1].value):
        return tuple(term.times(1 / operands[1].value) for term in known[0])
    return ()


def _single(operand: Known) -> Term:
    """A matrix as one term."""
    return operand.terms[0] if len(operand.terms) == 1 else Term((operand.value,))


def _multiplied_out(equation: jaxprs.Equation, operands: list[Known]) -> Any:
    """The example's operand times each term, added up, or None where it is left alone."""
    place = next((i for i, operand in enumerate(operands) if operand.terms), None)
    contracting, batch = equation.params["dimension_numbers"]
    if place is None or batch != ((), ()) or len(contracting[place]) != 1:
        return None
    x, (axis,), (contracted,) = (
        operands[1 - place].value,
        contracting[1 - place],
        contracting[place],
    )
    p, q = operands[place].value.shape
    terms = operands[place].terms
    terms = terms if contracted == 0 else tuple(term.transposed for term in terms)
    positions = x.size // x.shape[axis]
    inner = sum(w.shape[1] for term in terms for w in term.matrices[:-1])
    dtypes = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
    # Worth it where it adds little to the product with the sum, or takes less than to pull the
    # gradient of each example back, whatever the number of products.
    little = 2 * (p + q) * inner <= p * q or 3 * positions * (p + q) <= 2 * p * q
    if len(dtypes) > 1 or not little:
        return None
    options = {name: equation.params[name] for name in ("precision", "preferred_element_type")}
    free = x.ndim - 1
    total: Any = 0
    for term in terms:
        product, at = x, axis
        for w in term.matrices:  # what is contracted goes, and a last axis comes
            numbers = (((at,), (0,)), ((), ()))
            product, at = lax.dot_general(product, w, numbers, **options), free
        total = total + (product if term.scale is None else product * term.scale)
    return total if place == 1 else jnp.moveaxis(total, -1, 0)


Run = Callable[[jaxprs.Jaxpr, Sequence[Any], Sequence[Known]], list[Known]]


def _scan(run: Run, equation: jaxprs.Equation, operands: list[Known]) -> list[Known]:
    consts, carry, xs = jaxprs.split_scan(equation, operands)
    body = jaxprs.open_jaxpr(equation.params["jaxpr"])

    def step(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        inside = [Known(value, of_example=True) for value in state]
        inside += [x._replace(value=value) for x, value in zip(xs, slices, strict=True)]
        values = [known.value for known in run(*body, [*consts, *inside])]
        return values[: len(carry)], values[len(carry) :]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    start = [known.value for known in carry]
    state, ys = lax.scan(step, start, [known.value for known in xs], **options)
    return [Known(value, of_example=True) for value in [*state, *ys]]


def _checkpoint(run: Run, equation: jaxprs.Equation, operands: list[Known]) -> list[Known]:
    def inside(values: list[Any]) -> list[Any]:
        known = [
            k._replace(value=value, terms=()) for k, value in zip(operands, values, strict=True)
        ]
        return [k.value for k in run(*jaxprs.inner_jaxpr(equation), known)]

    rematerialised = jax.checkpoint(
        inside, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"]
    )
    values = rematerialised([known.value for known in operands])
    return [Known(value, of_example=True) for value in values]
