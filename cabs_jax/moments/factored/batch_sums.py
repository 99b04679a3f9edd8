"""Sums over a batch from one backward pass: of the gradients, and of their squares.

The sorted per-example loss (see `program`) is evaluated for the whole batch by the `interpreter`.
At each site a slot is added that changes nothing in the forward pass and whose derivative is what
we want to know: the squared norms of the examples' gradients, their factors, a second sum of them,
or the gradients themselves (see `values` and `site_vjps`). One vector-Jacobian product then returns
the ordinary gradient and the contents of all slots, and whatever the loss does on the way
(checkpointing, scans, custom derivative rules) keeps working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cabs_jax.moments.factored import interpreter
from cabs_jax.moments.factored.choice import Choice, Mode, choose
from cabs_jax.moments.factored.collected import empty_factors, norms_of_sums
from cabs_jax.moments.factored.outer_products import HIGHEST
from cabs_jax.moments.factored.primitives import Factors
from cabs_jax.moments.factored.program import trace_program
from cabs_jax.moments.factored.pulled_back import empty_operands, pulled_back
from cabs_jax.moments.factored.shift import shift_gradient
from cabs_jax.moments.factored.sorted_loss import Program
from cabs_jax.moments.factored.values import Batched, Context, Sample, Shared, Value, to_batched
from cabs_jax.moments.shards import Layout, Layouts, gathered, scattered
from cabs_jax.statistics import PyTree, Variance, squared_norms


class BatchSums(NamedTuple):
    """Sums over the examples of a batch.

    Attributes:
      losses: Loss of each example, float32, shape (m,).
      gradient: Σ_i w_i g_i, a float32 tree like the parameters.
      again: Σ_i w_i² g_i likewise; () where it was not asked for.
      squares: For the trace, ‖w_i g_i‖² of each example, shape (m,); by parameter, a tree of these;
        for the diagonal, Σ_i (w_i g_i)², a float32 tree like the parameters.
      shift: Σ_i w_i ∇r for the terms r of the loss that depend on parameters alone, which is in
        neither of the two, a float32 tree like the parameters; () if there are none.
      aux: Auxiliary outputs of each example.

    Where the parameters are parts, so are the sums that are like them, over all devices' examples.
    """

    losses: jax.Array
    gradient: PyTree
    again: PyTree
    squares: PyTree
    shift: PyTree
    aux: PyTree


class Slots(NamedTuple):
    """All slots of an evaluation; every one is float32 and holds zeros.

    Attributes:
      norms: Squared norms, shape (m,), by parameter.
      gradients: Per-example gradients (m, *shape), by parameter.
      squares: Sums of squared gradients, by parameter.
      again: Second sums of gradients, by parameter.
      factors: Factors, or what they are made of, by site.
    """

    norms: dict[int, jax.Array]
    gradients: dict[int, jax.Array]
    squares: dict[int, jax.Array]
    again: dict[int, jax.Array]
    factors: dict[int, Factors]


def batch_sums(
    loss_fn: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    weights: jax.Array,
    variance: Variance,
    sample: Sample,
    *,
    twice: bool = False,
    layouts: Layouts = (),
) -> BatchSums:
    """Sums losses, gradients and squared gradients over a batch.

    Args:
      loss_fn: `loss_fn(params, example) -> (loss, aux)`.
      params: Parameters, floating-point arrays.
      batch: Examples, stacked along the leading axis.
      weights: Weight of each example's loss, float32, shape (m,).
      variance: Whether squares are summed over entries ("trace", "by_parameter") or over examples
        ("diagonal").
      sample: The m examples.
      twice: Whether Σ_i w_i² g_i is asked for too.
      layouts: How each parameter lies on the devices; by default all are whole.
    """
    layouts = layouts or (None,) * len(jax.tree.leaves(params))
    program, parts, leaves, treedef = _trace(loss_fn, params, batch, layouts)
    choices = choose(program, len(leaves), variance)
    batched = [Batched(jnp.asarray(x)) for x in jax.tree.leaves(batch)]
    # Cotangents have the dtype of what they belong to, and those of parts are sums over devices.
    wide = [p if lay is None else _widened(p) for p, lay in zip(parts, layouts, strict=True)]
    differentiated, fixed = _split_leaves(wide, choices)
    # In units of 1/m, so that a cotangent in float16 keeps its size.
    shares = weights * sample.examples if twice else None

    def weighted_losses(
        differentiated: dict[int, jax.Array], slots: Slots
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        context = Context(program, choices, variance, sample, slots.norms, slots.factors, shares)
        shared = [
            _shared(leaf, slots, i, layouts[i])
            for i, leaf in sorted((fixed | differentiated).items())
        ]
        inputs: list[Value] = [*shared, *batched]
        outputs = interpreter.run(context, program.body, inputs)
        arrays = [to_batched(sample, output).value for output in outputs]
        losses, aux = jax.tree.unflatten(program.out_tree, arrays)
        losses = losses.astype(jnp.float32)
        return jnp.where(weights != 0, losses * weights, 0.0), (losses, aux)

    slots = _empty_slots(program, leaves, parts, choices, variance, sample)
    if twice:
        slots = slots._replace(again={i: sample.zeros(parts[i].shape) for i in differentiated})
    terms, pull, (losses, aux) = jax.vjp(weighted_losses, differentiated, slots, has_aux=True)
    gradients, slots = pull(jnp.ones_like(terms))
    second = {i: total / sample.examples for i, total in slots.again.items()}
    held = slots.gradients.items()
    gradients |= {i: scattered(layouts[i], jnp.sum(g, axis=0)) for i, g in held}
    if twice:
        of_weighted = functools.partial(jnp.tensordot, weights, axes=1, precision=HIGHEST)
        second |= {i: scattered(layouts[i], of_weighted(g)) for i, g in held}
    behind = pulled_back(program, choices, leaves, slots.factors, variance, sample)
    if variance == "diagonal":
        exact = [layout and layout.exact() for layout in layouts]
        summed = behind | {i: jnp.sum(jnp.square(g), axis=0) for i, g in held}
        summed = {i: scattered(exact[i], total) for i, total in summed.items()}
        squares: PyTree = treedef.unflatten(_or_zeros(slots.squares | summed, parts))
    else:
        norms = slots.norms | norms_of_sums(choices, slots.factors, sample.target)
        norms |= behind
        # Those of a bias are cotangents as they are; others are added up and squared in one pass.
        norms |= {
            i: squared_norms(g, 1) if g.ndim == 2 else jnp.sum(jnp.square(g), range(1, g.ndim))
            for i, g in held
        }
        none = sample.zeros((sample.examples,))
        if variance == "trace":
            squares = sum(norms.values(), start=none)
        else:
            squares = treedef.unflatten([norms.get(i, none) for i in range(len(leaves))])
    shifted = shift_gradient(program, leaves)
    shifted = {i: scattered(layouts[i], g * jnp.sum(weights)) for i, g in shifted.items()}
    shift = treedef.unflatten(_or_zeros(shifted, parts)) if shifted else ()
    gradient = treedef.unflatten(_or_zeros(gradients, parts))
    again = treedef.unflatten(_or_zeros(second, parts)) if twice else ()
    return BatchSums(losses, gradient, again, squares, shift, aux)


def batch_losses(
    loss_fn: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    sample: Sample,
    layouts: Layouts,
) -> jax.Array:
    """Losses (m,) of the examples, parts of parameters being gathered where they are used."""
    program, parts, _, _ = _trace(loss_fn, params, batch, layouts)
    shared = [Shared(part, layout=lay) for part, lay in zip(parts, layouts, strict=True)]
    batched = [Batched(jnp.asarray(x)) for x in jax.tree.leaves(batch)]
    unmeasured = Context(program, (), "trace", sample, {}, {})
    loss, *_ = interpreter.run(unmeasured, program.body, [*shared, *batched])
    losses: jax.Array = to_batched(sample, loss).value
    return losses


def _trace(
    loss_fn: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    layouts: Layouts,
) -> tuple[Program, list[jax.Array], list[jax.Array], Any]:
    """The sorted loss, the parts of its parameters, these gathered, and their tree."""
    treedef: Any  # its stub has no methods
    parts, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
    # Of those that are gathered here, little but their shapes is used.
    leaves = [gathered(layout, part) for layout, part in zip(layouts, parts, strict=True)]
    return trace_program(loss_fn, treedef.unflatten(leaves), batch), parts, leaves, treedef


def _shared(leaf: jax.Array, slots: Slots, i: int, layout: Layout | None) -> Shared:
    gradients, squares, again = (s.get(i) for s in (slots.gradients, slots.squares, slots.again))
    return Shared(leaf, gradients, squares, again, layout=layout)


def _widened(part: jax.Array) -> jax.Array:
    return part.astype(jnp.promote_types(part.dtype, jnp.float32))


def _split_leaves(
    leaves: list[jax.Array], choices: tuple[Choice, ...]
) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
    """Splits the parameters into those to differentiate and those to hold fixed, by number.

    Held fixed are those that the loss does not depend on, and those whose gradient will be the sum
    of the gradients of all examples.
    """
    numbered, summed = dict(enumerate(leaves)), {Mode.UNUSED, Mode.PER_EXAMPLE}
    fixed = {i: leaf for i, leaf in numbered.items() if choices[i].mode in summed}
    return {i: leaf for i, leaf in numbered.items() if i not in fixed}, fixed


def _empty_slots(
    program: Program,
    leaves: list[jax.Array],
    parts: list[jax.Array],
    choices: tuple[Choice, ...],
    variance: Variance,
    sample: Sample,
) -> Slots:
    """Slots for all but a second sum."""

    def shapes(arrays: list[jax.Array], mode: Mode) -> dict[int, tuple[int, ...]]:
        return {i: arrays[i].shape for i, choice in enumerate(choices) if choice.mode is mode}

    m, held = sample.examples, shapes(leaves, Mode.PER_EXAMPLE)
    in_place, diagonal = shapes(parts, Mode.IN_PLACE), variance == "diagonal"
    return Slots(
        norms={} if diagonal else {i: sample.zeros((m,)) for i in in_place},
        gradients={i: sample.zeros((m, *shape)) for i, shape in held.items()},
        squares={i: sample.zeros(shape) for i, shape in in_place.items()} if diagonal else {},
        again={},
        factors=empty_factors(choices, sample) | empty_operands(program, choices, sample),
    )


def _or_zeros(known: dict[int, jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
    """What is known of each parameter in float32, zeros where there is nothing."""
    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
    return [known.get(i, zero).astype(jnp.float32) for i, zero in enumerate(zeros)]
