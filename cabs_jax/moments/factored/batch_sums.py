"""Per-example squared gradient norms from one backward pass, without per-example gradients.

The sorted per-example loss (see `tracing`) is evaluated for the whole batch. At each site a slot is
added that changes nothing in the forward pass and whose cotangent is what we want to know: the
squared norms of the examples' gradients, their factors, or the gradients themselves. One vector-
Jacobian product then returns the ordinary gradient and the contents of all slots, and whatever the
loss does on the way (checkpointing, scans, custom derivative rules) keeps working.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import cost, interpreter, outer_products, views
from cabs_jax.moments.factored.choice import Choice, Mode, choose, weight
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.factored.program import Plan, plan
from cabs_jax.moments.factored.site_vjps import Batched, Context, Shared, Value, to_batched
from cabs_jax.statistics import Variance

PyTree = Any


class BatchSums(NamedTuple):
    """Sums over the examples of a batch.

    Attributes:
      losses: Loss of each example, float32, shape (m,).
      gradient: Σ_i w_i g_i, a float32 tree like the parameters.
      squares: For the trace, ‖w_i g_i‖² of each example, shape (m,), or (n,) for a subsample; for
        the diagonal, Σ_i (w_i g_i)², a float32 tree like the parameters.
      shift: Gradient of the terms of the loss that depend on parameters alone, which is in neither
        of the two, a float32 tree like the parameters; () if there are none.
      aux: Auxiliary outputs of each example.
    """

    losses: jax.Array
    gradient: PyTree
    squares: PyTree
    shift: PyTree
    aux: PyTree


def batch_sums(
    loss_fn: Any,
    params: PyTree,
    batch: PyTree,
    weights: jax.Array,
    *,
    variance: Variance = "trace",
    has_aux: bool = False,
    measured: int | None = None,
    axes: tuple[str, ...] = (),
) -> BatchSums:
    """Sums losses, gradients and squared gradients over a batch.

    Args:
      loss_fn: `loss_fn(params, example) -> loss`, or `(loss, aux)`.
      params: Parameters; those that are not floating-point get a zero gradient.
      batch: Examples, stacked along the leading axis.
      weights: Weight of each example's loss, float32, shape (m,).
      variance: Whether squares are summed over entries ("trace") or over examples ("diagonal").
      has_aux: Whether `loss_fn` returns auxiliary data.
      measured: Number of examples, evenly spread, whose squares are summed; None for all.
      axes: Mesh axes over which everything here varies, inside a shard_map.
    """
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
    examples = weights.shape[0]
    the_plan, out_tree = trace_plan(loss_fn, params, batch)
    choices = choose(the_plan, len(leaves), variance)
    context = Context(the_plan, choices, variance, examples, measured or examples, axes)
    batched = [Batched(jnp.asarray(x)) for x in jax.tree.leaves(batch)]
    sums_of_slots = context.measured == examples
    differentiated = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if choices[i].mode in {Mode.IN_PLACE, Mode.COLLECTED}
        or (choices[i].mode is Mode.PER_EXAMPLE and not sums_of_slots)
    }

    def weighted_loss(
        differentiated: dict[int, Any], slots: Slots
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        inputs: list[Value] = [
            Shared(differentiated.get(i, leaf), slots.gradient_slots.get(i), slots.squares.get(i))
            for i, leaf in enumerate(leaves)
        ]
        here = context._replace(norms=slots.norms, collected=slots.collected)
        outputs = interpreter.run(here, the_plan.program, [*inputs, *batched])
        results = [to_batched(here, output).value for output in outputs]
        result = jax.tree.unflatten(out_tree, results)
        losses, aux = result if has_aux else (result, ())
        losses = losses.astype(jnp.float32)
        return jnp.sum(jnp.where(weights != 0, losses * weights, 0.0)), (losses, aux)

    derivative = jax.grad(weighted_loss, argnums=(0, 1), has_aux=True)
    (gradients, filled), (losses, aux) = derivative(differentiated, _empty_slots(context, leaves))

    slots = filled.gradient_slots
    total = [
        (jnp.sum(slots[i], axis=0) if i in slots and sums_of_slots else gradients[i]).astype(
            jnp.float32
        )
        if i in differentiated or i in slots
        else jnp.zeros(jnp.shape(leaf), jnp.float32)
        for i, leaf in enumerate(leaves)
    ]
    squares: PyTree
    if variance == "trace":
        squares = filled.norms + _collected_norms(context, filled.collected)
        squares = squares + sum(
            jnp.sum(jnp.square(t), axis=range(1, t.ndim)) for t in slots.values()
        )
    else:
        by_leaf = filled.squares | {i: jnp.sum(jnp.square(t), axis=0) for i, t in slots.items()}
        zeros = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in leaves]
        squares = jax.tree.unflatten(treedef, [by_leaf.get(i, z) for i, z in enumerate(zeros)])
    shifted = _shift_gradient(context, leaves, len(batched))
    return BatchSums(
        losses,
        jax.tree.unflatten(treedef, total),
        squares,
        jax.tree.unflatten(treedef, shifted) if shifted else (),
        aux,
    )


def _shift_gradient(context: Context, leaves: list[Any], num_inputs: int) -> list[jax.Array]:
    """Gradient of the terms of the loss that depend on parameters alone, if there are any."""
    program = context.plan.program
    if not interpreter.has_shift(program):
        return []
    floating = {i: x for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)}

    def terms(floating: dict[int, Any]) -> jax.Array:
        values = [Shared(floating.get(i, leaf)) for i, leaf in enumerate(leaves)]
        return interpreter.shift(context, program, [*values, *[None] * num_inputs])[0]

    gradient = jax.grad(terms)(floating)
    zeros = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in leaves]
    return [gradient.get(i, zero).astype(jnp.float32) for i, zero in enumerate(zeros)]


def trace_plan(loss_fn: Any, params: PyTree, batch: PyTree) -> tuple[Plan, Any]:
    """Traces `loss_fn(params, example)` for the examples of a batch and sorts it."""
    example = jax.tree.map(_first, batch)
    closed, out_tree = jaxprs.trace(loss_fn, params, example)
    leaves = jax.tree.leaves(params)
    floating = [bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating)) for leaf in leaves]
    return plan(closed, len(leaves), floating), out_tree


def _first(x: Any) -> Any:
    """The first example of an array, or of what describes one.

    Not by `eval_shape`, whose result is no valid argument where some mesh axes are manual.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.lax.index_in_dim(x, 0, keepdims=False)


class Slots(NamedTuple):
    """All slots of an interpreter.

    Attributes:
      norms: Squared norms, shape (measured,).
      gradient_slots: Per-example gradients, by parameter.
      squares: Sums of squared gradients, by parameter.
      collected: Factors, by site.
    """

    norms: jax.Array
    gradient_slots: dict[int, jax.Array]
    squares: dict[int, jax.Array]
    collected: dict[int, tuple[jax.Array, jax.Array]]


def _empty_slots(context: Context, leaves: list[Any]) -> Slots:
    def shapes(mode: Mode) -> dict[int, tuple[int, ...]]:
        return {
            i: jnp.shape(leaves[i])
            for i, choice in enumerate(context.choices)
            if choice.mode is mode
        }

    gradient_slots = {
        i: context.zeros((context.measured, *shape))
        for i, shape in shapes(Mode.PER_EXAMPLE).items()
    }
    squares = {}
    if context.variance == "diagonal":
        squares = {i: context.zeros(shape) for i, shape in shapes(Mode.IN_PLACE).items()}
    collected: dict[int, tuple[jax.Array, jax.Array]] = {}
    for choice in context.choices:
        if choice.mode is Mode.COLLECTED:
            collected |= {number: _empty_factors(context, number) for number in choice.sites}
    return Slots(context.zeros((context.measured,)), gradient_slots, squares, collected)


def _empty_factors(context: Context, number: int) -> tuple[jax.Array, jax.Array]:
    site = context.plan.sites[number]
    assert site.rule is not None
    groups, positions, p, q = site.rule.sizes()
    lead = (*site.depth, context.measured)
    other = site.equation.invars[1 - site.rule.operand].aval.dtype
    left = (
        context.zeros((*lead, positions))
        if site.rule.one_hot
        else context.zeros((*lead, groups, positions, p), other)
    )
    right_dtype = site.equation.outvars[0].aval.dtype
    return left, context.zeros((*lead, groups, positions, q), right_dtype)


def _collected_norms(context: Context, collected: dict[int, tuple[jax.Array, jax.Array]]) -> Any:
    """Squared norms (measured,) of the parameters whose factors were collected."""
    total: Any = 0.0
    for choice in context.choices:
        if choice.mode is Mode.COLLECTED:
            total = total + _norms_of_sum(context, choice, collected)
    return total


def _norms_of_sum(
    context: Context, choice: Choice, collected: dict[int, tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """Squared norms of one parameter's gradients, each the sum over its uses."""
    first = min(choice.sites, key=lambda n: not _rule(context, n).one_hot)
    side = _left_layout(context, first)
    uses = []
    for number in choice.sites:
        left, right = _positions_last(context, number, collected[number])
        swapped = _left_layout(context, number) != side
        uses.append((right, left) if swapped else (left, right))
    groups, _, p, q = _rule(context, first).sizes()
    sizes = groups, sum(right.shape[2] for _, right in uses), p, q
    direct = cost.prefers_direct(sizes)

    def block(uses: list[tuple[jax.Array, jax.Array]]) -> tuple[PyTree, jax.Array]:
        if not direct:
            return (), outer_products.gram_norms(uses)
        g = sum(outer_products.gradients(use, p) for use in uses)
        return (), jnp.sum(jnp.square(g), axis=(1, 2, 3))

    norms: jax.Array = outer_products.over_blocks(
        block, uses, cost.norm_bytes(sizes, direct=direct)
    )[1]
    return norms


def _rule(context: Context, number: int) -> Rule:
    rule = context.plan.sites[number].rule
    assert rule is not None
    return rule


def _left_layout(context: Context, number: int) -> tuple[views.Atom, ...]:
    _, view = weight(context.plan.sites[number])
    return views.layout(view, _rule(context, number).left)


def _positions_last(
    context: Context, number: int, factors: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Makes the steps of the scans around a site positions of its factors."""
    depth = len(context.plan.sites[number].depth)
    left, right = factors
    right = _merge_steps(right, depth, 2)
    if _rule(context, number).one_hot:
        return _merge_steps(left, depth, 1).astype(jnp.int32), right
    return _merge_steps(left, depth, 2), right


def _merge_steps(x: jax.Array, depth: int, axis: int) -> jax.Array:
    """Moves `depth` leading axes in front of an axis and merges them with it."""
    order = (*range(depth, depth + axis), *range(depth), *range(depth + axis, x.ndim))
    x = x.transpose(order)
    shape = (*x.shape[:axis], -1, *x.shape[axis + depth + 1 :])
    return x.reshape(shape)
