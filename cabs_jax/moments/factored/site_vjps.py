"""Evaluates the sites of a per-example loss for a whole batch, each with a slot in its derivative.

A slot is an argument that the result does not depend on. The derivative rule written here reports
through its cotangent what the gradients of the examples are like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs, sharding
from cabs_jax.moments.factored import cost, outer_products
from cabs_jax.moments.factored.choice import Choice, Mode, copies_are_cheap
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.factored.program import Plan, Site
from cabs_jax.moments.rewriting import without_batched_convolutions
from cabs_jax.statistics import Variance

PyTree = Any


class Shared(NamedTuple):
    """A value that is the same for all examples.

    Attributes:
      value: The value.
      gradient_slots: Slots for its per-example gradients, float32, a leading axis of examples,
        or None.
      squares: Slot for the sum of their squares, float32, shaped like the value, or None.
    """

    value: Any
    gradient_slots: Any = None
    squares: Any = None


class Batched(NamedTuple):
    """A value with a leading axis of examples."""

    value: Any


Value = Shared | Batched


class Context(NamedTuple):
    """What the evaluation of a batch needs to know.

    Attributes:
      plan: The sorted loss.
      choices: How each parameter is measured.
      variance: "trace" or "diagonal".
      examples: Size of the batch.
      measured: How many of the examples are measured, evenly spread; all of them by default.
      axes: Mesh axes over which the batch varies, inside a shard_map.
      norms: Slot for squared norms, shape (measured,).
      collected: Slots for factors, by site.
    """

    plan: Plan
    choices: tuple[Choice, ...]
    variance: Variance
    examples: int
    measured: int
    axes: tuple[str, ...]
    norms: Any = None
    collected: dict[int, Any] = {}  # noqa: RUF012

    def rows(self, x: jax.Array) -> jax.Array:
        """Keeps the examples that are measured."""
        if self.measured == self.examples:
            return x
        step = self.examples // self.measured
        if step * self.measured == self.examples:
            return x.reshape(self.measured, step, *x.shape[1:])[:, 0]
        return x[: step * self.measured : step]

    def spread(self, gradient_slots: jax.Array) -> jax.Array:
        """Puts slots of measured examples where those stand in the batch, zeros elsewhere."""
        if self.measured == self.examples:
            return gradient_slots
        step = self.examples // self.measured
        after = self.examples - (self.measured - 1) * step - 1
        config = [(0, after, step - 1)] + [(0, 0, 0)] * (gradient_slots.ndim - 1)
        return lax.pad(gradient_slots, jnp.zeros((), gradient_slots.dtype), config)

    def zeros(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """An empty slot."""
        slot: jax.Array = sharding.vary(jnp.zeros(shape, dtype), self.axes)
        return slot


def slot_dtype(dtype: Any) -> Any:
    """The dtype of a slot for gradients of a value: float32, or complex64 for a complex value."""
    return jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32


def to_batched(context: Context, value: Value) -> Batched:
    """Gives every example a copy of its own of a shared value."""
    if isinstance(value, Batched):
        return value
    shape = jnp.shape(value.value)
    copies = jnp.broadcast_to(value.value, (context.examples, *shape))
    copies = sharding.vary(copies, context.axes)
    if value.gradient_slots is not None:
        copies = copies + context.spread(value.gradient_slots).astype(copies.dtype)
    return Batched(copies)


def evaluate_plain(equation: jaxprs.Equation, values: list[Value]) -> list[Batched]:
    """Evaluates an equation for every example."""
    axes = [0 if isinstance(v, Batched) else None for v in values]
    arrays = [v.value for v in values]
    outputs = jax.vmap(lambda *xs: jaxprs.evaluate(equation, xs), axes)(*arrays)
    return [Batched(output) for output in outputs]


def evaluate_site(context: Context, number: int, values: list[Value]) -> list[Batched]:
    """Evaluates an equation in which parameters meet the example."""
    site = context.plan.sites[number]
    leaves = [leaf for _, parameter in site.weights for leaf in parameter.leaves]
    modes = {context.choices[leaf].mode for leaf in leaves}
    if Mode.PER_EXAMPLE not in modes:
        return [_by_rule(context, number, values, modes.pop())]
    if site.rule is not None:
        return [_by_rule(context, number, values, Mode.PER_EXAMPLE)]
    if copies_are_cheap(site):
        operands = {operand for operand, _ in site.weights}
        lifted = [to_batched(context, v) if i in operands else v for i, v in enumerate(values)]
        return evaluate_plain(site.equation, lifted)
    return _by_derivative(context, site, values)


def _by_rule(context: Context, number: int, values: list[Value], mode: Mode) -> Batched:
    """A site whose primitive has a rule."""
    site = context.plan.sites[number]
    rule = site.rule
    assert rule is not None
    weight = values[rule.operand]
    assert isinstance(weight, Shared)

    def forward(w: jax.Array, x: jax.Array) -> jax.Array:
        operands: list[Value] = [Batched(x), Batched(x)]
        operands[rule.operand] = Shared(w)
        (output,) = evaluate_plain(site.equation, operands)
        return jnp.asarray(output.value)

    measure, slot = {
        Mode.IN_PLACE: (_square_sums, weight.squares)
        if context.variance == "diagonal"
        else (_norms, context.norms),
        Mode.COLLECTED: (_factors, context.collected.get(number)),
        Mode.PER_EXAMPLE: (_gradients, weight.gradient_slots),
    }[mode]

    assert slot is not None  # without one, what it should report would be lost

    @jax.custom_vjp
    def apply(w: jax.Array, x: jax.Array, slot: PyTree) -> jax.Array:
        return forward(w, x)

    def apply_forward(w: jax.Array, x: jax.Array, slot: PyTree) -> tuple[jax.Array, PyTree]:
        return forward(w, x), (w, x)

    def apply_backward(saved: PyTree, cotangent: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        w, x = saved
        into_x = None
        if jnp.issubdtype(x.dtype, jnp.inexact):
            (into_x,) = jax.linear_transpose(lambda x: forward(w, x), x)(cotangent)

        def into_w() -> jax.Array:
            (gradient,) = jax.linear_transpose(lambda w: forward(w, x), w)(cotangent)
            return jnp.asarray(gradient)

        gradient, report = measure(context, rule, (w, x, cotangent), into_w)
        return gradient, into_x, report

    apply.defvjp(apply_forward, apply_backward)
    (x,) = [v.value for i, v in enumerate(values) if i != rule.operand]
    return Batched(apply(weight.value, x, slot))


Residuals = tuple[jax.Array, jax.Array, jax.Array]
Measure = tuple[jax.Array, PyTree]


def _norms(
    context: Context, rule: Rule, residuals: Residuals, into_w: Callable[[], jax.Array]
) -> Measure:
    """Gradient of the batch and squared norms of the examples' gradients."""
    w, x, cotangent = residuals
    rows = rule.sizes()[2]
    direct = cost.prefers_direct(rule.sizes())
    everything = context.measured == context.examples

    def block(operands: PyTree) -> tuple[PyTree, PyTree]:
        factors = rule.factors(*operands)
        if not direct:
            return (), outer_products.gram_norms([factors])
        g = outer_products.gradients(factors, rows)
        return (g if everything else ()), jnp.sum(g * g, axis=(1, 2, 3))

    measured = (context.rows(x), context.rows(cotangent))
    total, norms = outer_products.over_blocks(
        block, measured, cost.norm_bytes(rule.sizes(), direct=direct)
    )
    if direct and everything:
        return rule.assemble(total, w.shape).astype(w.dtype), norms
    return into_w(), norms


def _square_sums(
    context: Context, rule: Rule, residuals: Residuals, into_w: Callable[[], jax.Array]
) -> Measure:
    """Gradient of the batch and the sum of the squares of the examples' gradients."""
    w, x, cotangent = residuals
    measured = (context.rows(x), context.rows(cotangent))
    _, positions, p, _ = rule.sizes()
    if positions == 1 and not rule.one_hot:
        return into_w(), rule.assemble(outer_products.square_sums(rule.factors(*measured)), w.shape)

    def block(operands: PyTree) -> tuple[PyTree, PyTree]:
        g = outer_products.gradients(rule.factors(*operands), p)
        return (g, g * g), ()

    (total, squares), _ = outer_products.over_blocks(
        block, measured, cost.norm_bytes(rule.sizes(), direct=True)
    )
    everything = context.measured == context.examples
    gradient = rule.assemble(total, w.shape).astype(w.dtype) if everything else into_w()
    return gradient, rule.assemble(squares, w.shape)


def _factors(
    context: Context, rule: Rule, residuals: Residuals, into_w: Callable[[], jax.Array]
) -> Measure:
    """Gradient of the batch and the factors of the examples' gradients."""
    _, x, cotangent = residuals
    left, right = rule.factors(context.rows(x), context.rows(cotangent))
    # Only floating-point slots have a cotangent; whole numbers up to 2²⁴ survive the cast.
    return into_w(), (left.astype(jnp.float32) if rule.one_hot else left, right)


def _gradients(
    context: Context, rule: Rule, residuals: Residuals, into_w: Callable[[], jax.Array]
) -> Measure:
    """The examples' gradients; that of the batch is their sum, taken at the end."""
    w, x, cotangent = residuals
    factors = rule.factors(context.rows(x), context.rows(cotangent))
    g = rule.assemble(outer_products.gradients(factors, rule.sizes()[2]), w.shape)
    everything = context.measured == context.examples
    return (jnp.zeros_like(w) if everything else into_w()), g


def _by_derivative(context: Context, site: Site, values: list[Value]) -> list[Batched]:
    """A site without a rule: its own derivative, taken example by example."""
    equation = site.equation
    places = [operand for operand, _ in site.weights]
    weights = {i: values[i].value for i in places}
    others = {i: v.value for i, v in enumerate(values) if isinstance(v, Shared) and i not in places}
    examples = {i: v.value for i, v in enumerate(values) if isinstance(v, Batched)}
    smooth = [i for i, x in examples.items() if jnp.issubdtype(x.dtype, jnp.inexact)]
    floating = [
        i for i, v in enumerate(equation.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    everything = context.measured == context.examples

    def of_one(fixed: Any, examples: Any, cotangents: Any) -> tuple[Any, Any]:
        """The derivative for one example, with respect to weights and floating operands."""
        weights, others = fixed

        def function(weights: Any, smoothly: Any) -> list[Any]:
            operands = others | examples | weights | smoothly
            outputs = jaxprs.evaluate(equation, [operands[i] for i in range(len(operands))])
            return [outputs[i] for i in floating]

        pull: Any
        _, pull = jax.vjp(function, weights, {i: examples[i] for i in smooth})
        gradients: tuple[Any, Any] = pull(cotangents)
        return gradients

    @jax.custom_vjp
    def apply(weights: Any, others: Any, examples: Any, slots: Any) -> list[Any]:
        operands = {i: Batched(x) for i, x in examples.items()}
        operands |= {i: Shared(x) for i, x in (weights | others).items()}
        outputs = evaluate_plain(equation, [operands[i] for i in range(len(operands))])
        return [output.value for output in outputs]

    def forward(weights: Any, others: Any, examples: Any, slots: Any) -> tuple[list[Any], Any]:
        return apply(weights, others, examples, slots), (weights, others, examples)

    def backward(saved: Any, cotangents: Any) -> tuple[Any, Any, Any, Any]:
        weights, others, examples = saved
        pulled = jax.vmap(without_batched_convolutions(of_one), (None, 0, 0))
        gradients, into_smooth = pulled(
            (weights, others), examples, [cotangents[i] for i in floating]
        )
        into_weights = {
            i: jnp.zeros_like(w) if everything else jnp.sum(gradients[i], axis=0)
            for i, w in weights.items()
        }
        into_examples = {i: into_smooth.get(i) for i in examples}
        slots = {i: context.rows(g).astype(slot_dtype(g.dtype)) for i, g in gradients.items()}
        return into_weights, None, into_examples, slots

    apply.defvjp(forward, backward)
    slots = {i: values[i].gradient_slots for i in places}  # type: ignore[union-attr]
    return [Batched(output) for output in apply(weights, others, examples, slots)]
