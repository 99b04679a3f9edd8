"""Products with a sum of products of weights, multiplied out: x·(W + c·A·B) = x·W + c·(x·A)·B.

Of a weight that is computed, such as a merged low-rank update, the gradient of each example would
be formed and pulled back. Multiplied out, every weight meets the example in a product of its own,
whose norm follows from factors. That is done where it is less work.

So it is with weights that are repeated or padded (see `spread`), and with complex ones, made of
two parameters: x·(A + iB) = x·A + i(x·B), where the two parts of x meet A in one product. And
`lax.ragged_dot`, of rows sorted by the expert that they go to, which JAX does not vmap, becomes one
product with all experts, in which a row is zero but for its own: as much work as it is on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cabs_jax._arguments import is_traced
from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import spread
from cabs_jax.statistics import PyTree

RAGGED = "ragged_dot_general"


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
      spread: For a weight of parameters alone, what it is made of along its axes, or None.
      parts: For a complex one, its real and its imaginary part, or None.
      constant: Evaluates what depends on nothing and is known while tracing, else None.
    """

    value: Any
    of_example: bool = False
    of_params: bool = False
    terms: tuple[Term, ...] = ()
    spread: spread.Spread | None = None
    parts: tuple[Any, Any] | None = None
    constant: Callable[[], Any] | None = None


def trace(function: Callable[..., PyTree], params: PyTree, example: PyTree) -> tuple[Any, Any]:
    """Traces a per-example function, as `jaxprs.trace` does, with such products multiplied out."""
    closed, out_tree = jaxprs.trace(function, params, example)
    shared, changed = len(jax.tree.leaves(params)), False

    def run(jaxpr: jaxprs.Jaxpr, consts: Sequence[Any], inputs: Sequence[Known]) -> list[Known]:
        return jaxprs.walk(jaxpr, consts, inputs, jaxpr.eqns, visit, _constant)

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
        if of_example and name == RAGGED and _goes_to_experts(equation):
            changed = True
            return [Known(_with_all_experts(equation, *values), of_example=True)]
        if of_example and name == "dot_general":
            product = _product(equation, operands)
            if product is not None:
                changed = True
                return [Known(product, of_example=True)]
        of_params = any(operand.of_params for operand in operands)
        if of_example or not of_params:
            outputs = jaxprs.evaluate(equation, values)
            constants = [None] * len(outputs) if of_example else _constants(equation, operands)
            return [
                Known(output, of_example, of_params, constant=constant)
                for output, constant in zip(outputs, constants, strict=True)
            ]
        if name == "gather" and _takes_distinct(equation, operands):
            equation, changed = _promised_distinct(equation), True
        outputs, terms = jaxprs.evaluate(equation, values), _terms(equation, operands)
        spread_out = _spread(equation, operands)
        parts = (values[0], values[1]) if name == "complex" else None
        return [Known(output, False, True, terms, spread_out, parts) for output in outputs]

    def rewritten(params: PyTree, example: PyTree) -> list[Any]:
        values = jax.tree.leaves((params, example))
        inputs = [Known(value, i >= shared, i < shared) for i, value in enumerate(values)]
        return [known.value for known in run(*jaxprs.open_jaxpr(closed), inputs)]

    values = jax.tree.leaves((params, example))
    of_params = [i < shared for i in range(len(values))]
    ragged = jaxprs.contains(closed.jaxpr, RAGGED)
    if not ragged and not jaxprs.any_of_inputs_alone(closed, of_params, _is_followed):
        return closed, out_tree
    again, _ = jaxprs.trace(rewritten, params, example)
    return (again if changed else closed), out_tree


def _constant(value: Any) -> Known:
    """A constant of a jaxpr."""
    return Known(value, constant=None if is_traced(value) else lambda: value)


def _constants(
    equation: jaxprs.Equation, operands: list[Known]
) -> Sequence[Callable[[], Any] | None]:
    """Evaluates the outputs of an equation of constants, once it is asked to."""
    known = [operand.constant for operand in operands]
    if None in known or jaxprs.depends_on_place(equation):
        return [None] * len(equation.outvars)

    @functools.cache
    def evaluated() -> list[Any]:
        return jaxprs.evaluate_now(equation, [value() for value in known if value is not None])

    return [functools.partial(lambda i: evaluated()[i], i) for i in range(len(equation.outvars))]


def _is_followed(equation: jaxprs.Equation) -> bool:
    """Whether an equation of parameters alone makes a weight that is taken apart here."""
    made_complex = jaxprs.name(equation) == "complex"
    return made_complex or _multiplies(equation) or spread.spreads(equation)


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


def _spread(equation: jaxprs.Equation, operands: list[Known]) -> spread.Spread | None:
    """What the output of an equation of parameters is made of along its axes."""
    weight, *others = operands
    if not weight.of_params or not (weight.spread or spread.spreads(equation)):
        return None
    mesh, here = jax.typeof(weight.value).sharding.mesh, jax.sharding.get_abstract_mesh()
    if not (mesh.empty or here.empty or mesh == here):
        raise ValueError(
            f"the loss works on a parameter of shape {weight.value.shape} on a mesh of its own, as "
            "jnp.repeat does where axes besides the batch's are Explicit: write "
            'jnp.broadcast_to(w[:, None], ...).reshape(...), or use method="per_example".'
        )
    if jaxprs.name(equation) not in {"gather", "pad"}:
        others = []
    constants = [np.asarray(o.constant()) if o.constant else None for o in others]
    return spread.through(weight.spread or spread.whole(weight.value), equation, constants)


def _takes_distinct(equation: jaxprs.Equation, operands: list[Known]) -> bool:
    """Whether entries of a parameter are taken that are known to differ."""
    table, indices = operands
    if not table.of_params or indices.constant is None:
        return False
    return spread.takes_distinct(equation, np.asarray(indices.constant()))


def _promised_distinct(equation: jaxprs.Equation) -> jaxprs.Equation:
    """The same gather, which says that its indices differ and that none is outside."""
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    promised = {"unique_indices": True, "mode": mode, "fill_value": None}
    return equation.replace(params=equation.params | promised)


def _product(equation: jaxprs.Equation, operands: list[Known]) -> Any:
    """The example's operand times a weight that is taken apart, or None where none is."""
    place = 0 if operands[1].of_example else 1
    x, weight = operands[1 - place], operands[place]
    if weight.of_example:
        return None
    if weight.parts is not None:
        return _by_parts(equation, x.value, place, weight.parts)
    if weight.spread is not None and any(weight.spread.maps):
        return spread.product(equation, x.value, place, weight.spread)
    return _multiplied_out(equation, operands)


def _by_parts(equation: jaxprs.Equation, x: Any, place: int, parts: tuple[Any, Any]) -> Any:
    """The product with a complex weight."""
    names = "dimension_numbers", "precision"
    options = {name: equation.params[name] for name in names}

    def real(w: Any) -> tuple[Any, Any]:
        """The parts of x·w, for a real weight."""

        def product(x: jax.Array) -> jax.Array:
            return lax.dot_general(*((w, x) if place == 0 else (x, w)), **options)

        re, im = jax.vmap(product)(jnp.stack([x.real, x.imag]))
        return re, im

    (re, im), (across, back) = map(real, parts)
    return lax.complex(re - back, im + across)


def _goes_to_experts(equation: jaxprs.Equation) -> bool:
    """Whether a ragged product is one of rows with matrices, each with that of its group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    plain = (((1,), (1,)), ((), ()))
    found = (*(tuple(map(tuple, pair)) for pair in numbers.dot_dimension_numbers),)
    alone = equation.params["group_offset"] is None
    return alone and found == plain and (tuple(ragged), tuple(groups)) == ((0,), (0,))


def _with_all_experts(equation: jaxprs.Equation, x: Any, w: Any, sizes: Any) -> jax.Array:
    """Rows (t, p) times matrices (groups, p, q), each row with that of its group."""
    row, ends = jnp.arange(x.shape[0])[:, None], jnp.cumsum(sizes)[None]
    own = (row >= ends - sizes[None]) & (row < ends)  # (t, groups)
    apart = jnp.where(own[:, :, None], x[:, None], jnp.zeros((), x.dtype))  # (t, groups, p)
    numbers = (((1, 2), (0, 1)), ((), ()))
    options = {name: equation.params[name] for name in ("precision", "preferred_element_type")}
    return lax.dot_general(apart, w, numbers, **options)


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
        # What is known of a whole stack does not hold for one of its slices.
        inside += [
            Known(value, x.of_example, x.of_params) for x, value in zip(xs, slices, strict=True)
        ]
        values = [known.value for known in run(*body, [*consts, *inside])]
        return values[: len(carry)], values[len(carry) :]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    start = [known.value for known in carry]
    state, ys = lax.scan(step, start, [known.value for known in xs], **options)
    return [Known(value, of_example=True) for value in [*state, *ys]]


def _checkpoint(run: Run, equation: jaxprs.Equation, operands: list[Known]) -> list[Known]:
    def inside(values: list[Any]) -> list[Any]:
        known = [
            k._replace(value=value, terms=(), spread=None, parts=None)
            for k, value in zip(operands, values, strict=True)
        ]
        return [k.value for k in run(*jaxprs.inner_jaxpr(equation), known)]

    rematerialised = jax.checkpoint(
        inside, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"]
    )
    values = rematerialised([known.value for known in operands])
    return [Known(value, of_example=True) for value in values]
