"""Derivative rules for the sites of a loss, which also measure the gradients of the examples.

At a site y_i = f(w, x_i) the parameter w is the same for all examples i, the operand x_i and the
output y_i are the example's own. The backward pass arrives with the cotangents c_i = ∂ℓ/∂y_i of the
whole batch, and by the chain rule

    g_i = (∂y_i/∂w)ᵀ c_i   is the gradient of example i through this site,
    Σ_i g_i                is what an ordinary derivative rule returns for w.

So everything that a statistic of the g_i is made of is at hand here, and only here: once the sum is
taken the examples cannot be told apart. Each site is therefore given a `jax.custom_vjp` of the form

    forward(w, x, slot) = f(w, x)                     the slot is ignored
    backward(c)         = Σ_i g_i,  (∂y_i/∂x_i)ᵀ c_i,  statistic of the g_i

whose last entry JAX takes for the derivative with respect to the slot, and hands to the caller.
Where a second sum Σ_i s_i g_i is asked for, it goes the same way, through a slot of its own: the
first is linear in the c_i, and becomes the second with s_i·c_i in their place. That is one product
more at each site; another backward pass would also take those that lead to the x_i.

Where a rule of `primitives` covers f, the g_i are sums of outer products of factors made of x and c
(`_by_rule`), and what is returned depends on the mode that was chosen for the parameter:

    IN_PLACE, trace       ‖g_i‖², shape (m,)                       `_norms`
        picked            0: they are taken by `picked`            `_sums_alone`
        pooled            ‖g_i‖², of rows brought to one number    `_pooled_norms`
    IN_PLACE, diagonal    Σ_i g_i², shaped like w                  `_square_sums`
    COLLECTED             the factors themselves                   `_factors`
    PULLED_BACK           the operands that they are made of       `_operands`
    PER_EXAMPLE           g_i, shape (m, *w.shape)                 `_gradients`

Where none does, the mode is PER_EXAMPLE. If copies of w are no larger than what f puts out (a bias,
say), every example is given one, and plain differentiation tells the gradients apart; else f is
differentiated one example at a time (`site_derivatives`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cabs_jax.moments import convolution, jaxprs
from cabs_jax.moments.blocks import sum_in_cache
from cabs_jax.moments.factored import forms, outer_products
from cabs_jax.moments.factored.choice import Mode, copies_are_cheap, product_of
from cabs_jax.moments.factored.primitives import Factors, Rule
from cabs_jax.moments.factored.site_derivatives import evaluate_by_derivative
from cabs_jax.moments.factored.sorted_loss import Site
from cabs_jax.moments.factored.values import (
    Batched,
    Context,
    Sample,
    Shared,
    Value,
    evaluate_batched,
    to_batched,
    whole,
    whole_slots,
)
from cabs_jax.moments.shards import gathered, scattered
from cabs_jax.moments.target import Target
from cabs_jax.statistics import PyTree, squared_norms


def evaluate_site(context: Context, number: int, values: list[Value]) -> list[Batched]:
    """Evaluates an equation in which parameters meet the example."""
    site = context.program.sites[number]
    if site.rule is not None:
        return [_by_rule(context, number, site, site.rule, values)]
    if not copies_are_cheap(site):
        return evaluate_by_derivative(context.sample, site, [whole(v) for v in values])
    places = {place for place, _ in site.parameters}
    copied = [to_batched(context.sample, v) if i in places else v for i, v in enumerate(values)]
    return evaluate_batched(context.sample, site.equation, copied)


class Residuals(NamedTuple):
    """What the backward pass knows at a site with a rule.

    Attributes:
      equation: The equation.
      w: The parameter, or what looks at it.
      x: The other operand, shape (m, ...), or a tuple of them where there are several.
      cotangent: The cotangents of the output, shape (m, ...).
      scale: What entries of the parameters are multiplied by to make those of w (see `Shared`).
      into_w: Computes the gradient of the batch as JAX would, Σ_i g_i, shaped like w.
    """

    equation: jaxprs.Equation
    w: jax.Array
    x: PyTree
    cotangent: jax.Array
    scale: jax.Array | None
    into_w: Callable[[], jax.Array]

    @property
    def operands(self) -> tuple[PyTree, jax.Array]:
        """The other operand and the cotangents, of which the examples' gradients are made."""
        return self.x, self.cotangent

    def assembled(self, rule: Rule, pieces: tuple[jax.Array, ...]) -> jax.Array:
        """A gradient, shaped like w, from pieces (groups, part of p, q) cut along p."""
        joined = jnp.concatenate(pieces, axis=-2)
        return rule.assemble(joined, self.w.shape).astype(self.w.dtype)


# Returns the gradient of the batch and the statistic that goes into the slot.
Measure = Callable[[Sample, Rule, Residuals], tuple[jax.Array, PyTree]]


def _by_rule(context: Context, number: int, site: Site, rule: Rule, values: list[Value]) -> Batched:
    """A site whose primitive has a rule, and so one parameter."""
    # A derivative rule must keep no tracer, as slots are: of the context it knows the sample alone.
    parameter, place, sample = values[rule.operand], rule.operand, context.sample
    assert isinstance(parameter, Shared)
    others = [to_batched(sample, v).value for i, v in enumerate(values) if i != place]
    other = others[0] if len(others) == 1 else tuple(others)
    parameter, layout = whole_slots(parameter), parameter.layout
    measure, slot = _measure(context, number, site, parameter)
    assert slot is not None  # without a slot, what it should return would be lost

    def evaluate(w: jax.Array, x: PyTree) -> jax.Array:
        operands: list[Value] = [Batched(operand) for operand in jax.tree.leaves(x)]
        operands.insert(place, Shared(w))
        (output,) = evaluate_batched(sample, site.equation, operands)
        return jnp.asarray(output.value)

    @jax.custom_vjp
    def apply(w: jax.Array, x: PyTree, fixed: PyTree, slots: PyTree) -> jax.Array:
        return evaluate(gathered(layout, w), x)

    def forward(w: jax.Array, x: PyTree, fixed: PyTree, slots: PyTree) -> tuple[jax.Array, PyTree]:
        return apply(w, x, fixed, slots), (w, x, fixed)

    def backward(saved: PyTree, cotangent: jax.Array) -> tuple[PyTree, PyTree, None, PyTree]:
        # The equation is linear in each operand: its derivative is its transpose.
        shard, x, (scale, shares) = saved
        w = gathered(layout, shard)  # again, so that no more than a part is kept
        into_x = None
        if not rule.one_hot and jnp.issubdtype(x.dtype, jnp.inexact):
            (into_x,) = jax.linear_transpose(lambda x: evaluate(w, x), x)(cotangent)

        def into_w(cotangent: jax.Array) -> jax.Array:
            (gradient,) = jax.linear_transpose(lambda w: evaluate(w, x), w)(cotangent)
            return jnp.asarray(gradient)

        of_batch = functools.partial(into_w, cotangent)
        at = Residuals(site.equation, w, x, cotangent, scale, of_batch)
        gradient, statistic = measure(sample, rule, at)
        gradient = scattered(layout, gradient).astype(shard.dtype)
        if shares is None:
            return gradient, into_x, None, (statistic, None)
        shaped = shares.reshape(shares.shape + (1,) * (cotangent.ndim - 1))
        again = into_w((cotangent * shaped).astype(cotangent.dtype)).astype(jnp.float32)
        return gradient, into_x, None, (statistic, again)

    apply.defvjp(forward, backward)
    again = parameter.again_slots
    fixed = parameter.scale, None if again is None else context.shares
    return Batched(apply(parameter.value, other, fixed, (slot, again)))


def _measure(
    context: Context, number: int, site: Site, parameter: Shared
) -> tuple[Measure, PyTree]:
    """What to measure at a site with a rule, and the slot that takes it."""
    ((_, origin),) = site.parameters
    # Several leaves behind one operand are all measured in the same way.
    leaf = min(origin.leaves)
    mode = context.choices[leaf].mode
    if mode is Mode.PER_EXAMPLE:
        return _gradients, parameter.gradient_slots
    if mode is Mode.COLLECTED:
        return _factors, context.factors.get(number)
    if mode is Mode.PULLED_BACK:
        return _operands, context.factors.get(number)
    if context.variance == "diagonal":
        return _square_sums, parameter.square_slots
    if product_of(site, context.choices[leaf], context.variance) is not None:
        return _sums_alone, context.norms.get(leaf)
    return _norms, context.norms.get(leaf)


def _sums_alone(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Gradient of the batch where norms are taken elsewhere (see `picked`)."""
    return at.into_w(), sample.zeros((sample.examples,))


def _norms(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Gradient of the batch and squared norms of the examples' gradients."""
    if at.scale is not None and at.scale.ndim:
        return _weighted_norms(sample, rule, at)
    gradient, norms = _plain_norms(sample, rule, at)
    return gradient, norms if at.scale is None else norms * jnp.square(at.scale)


def _weighted_norms(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Norms of gradients whose entries are multiplied by a scale, one for each."""
    assert at.scale is not None
    scale, alike = rule.lay_out(at.scale), forms.rounds_alike(at.equation, sample.target)
    direct = not rule.one_hot and rule.positions > 1

    def block(operands: PyTree) -> tuple[PyTree, PyTree]:
        if direct:
            pieces = _gradients_in_pieces(sample.target, at.equation, rule, operands)
            ends = itertools.accumulate(g.shape[-2] for g in pieces[:-1])
            scales = jnp.split(scale, list(ends), axis=-2)
            weighted = (g * s[None] for g, s in zip(pieces, scales, strict=True))
            norms = sum(squared_norms(g, 1) for g in weighted)
            return pieces, norms
        left, right = rule.factors(*operands)
        if rule.one_hot:  # row by row, before the rows are added up
            right = right * scale[0, left][:, None].astype(right.dtype)
            return (), _one_hot_norms(sample, rule, (left, right))
        factors = outer_products.rounded((left, right)) if alike else (left, right)
        return (), outer_products.weighted_norms(factors, scale)

    return _in_cache(sample, rule, at, block, direct)


def _plain_norms(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Norms of gradients whose entries are those of the parameters' gradients."""
    if rule.apart:
        return at.into_w(), _one_hot_norms(sample, rule, rule.factors(*at.operands))
    if forms.is_by_kernel(at.equation, rule, sample.target):
        return _by_kernel(sample, rule, at)
    if rule.pooled:
        return _pooled_norms(sample, rule, at)
    sizes, alike = rule.sizes(), forms.rounds_alike(at.equation, sample.target)
    direct = forms.is_direct(at.equation, rule, sample.target)

    def block(operands: PyTree) -> tuple[PyTree, PyTree]:
        if direct:
            pieces = _gradients_in_pieces(sample.target, at.equation, rule, operands)
            norms = sum(squared_norms(g, 1) for g in pieces)
            return pieces, norms
        factors = rule.factors(*operands)
        if rule.one_hot:
            return (), _one_hot_norms(sample, rule, factors)
        if alike and sizes[1] == 1:
            factors = outer_products.rounded(factors)
        model = outer_products.model_precision(at.equation)
        precision = model if alike else outer_products.HIGHEST
        return (), outer_products.gram_norms([factors], precision)

    return _in_cache(sample, rule, at, block, direct)


def _one_hot_norms(sample: Sample, rule: Rule, factors: Factors) -> jax.Array:
    by_sorting = forms.is_sorted(rule, sample.target)
    return outer_products.one_hot_norms(factors, apart=rule.apart, by_sorting=by_sorting)


def _pooled_norms(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Gradient of the batch and norms where all that is looked up is added up."""
    factors, _ = outer_products.narrowed(rule.factors(*at.operands))
    in_table, rows = forms.is_in_table(rule, sample.target), rule.sizes()[2]

    def block(factors: Factors) -> tuple[PyTree, jax.Array]:
        if in_table:
            return (), squared_norms(outer_products.gradients(factors, rows), 1)
        return (), _one_hot_norms(sample, rule, factors)

    needed = forms.pooled_bytes(rule, sample.target)
    _, norms = sum_in_cache(block, factors, needed, sample.target)
    return at.into_w(), norms


def _in_cache(
    sample: Sample,
    rule: Rule,
    at: Residuals,
    block: Callable[[PyTree], tuple[PyTree, PyTree]],
    direct: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of the batch and norms, from blocks that give norms and, if direct, gradients."""
    needed = forms.norm_bytes(at.equation, rule, sample.target, direct=direct)
    total, norms = sum_in_cache(block, at.operands, needed, sample.target)
    return (at.assembled(rule, total) if direct else at.into_w()), norms


def _by_kernel(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Gradient of the batch and norms where a kernel makes both."""
    from cabs_jax.moments.factored import kernels

    precision = outer_products.model_precision(at.equation)
    total, norms = kernels.measured(at.equation, rule, *at.operands, precision, sample.target)
    return at.assembled(rule, (total,)), norms


def _square_sums(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """Gradient of the batch and the sum of the squares of the examples' gradients."""
    if rule.one_hot:
        factors, rows = rule.factors(*at.operands), rule.sizes()[2]
        by_sorting = forms.is_sorted(rule, sample.target)
        if rule.pooled:
            in_table = forms.is_in_table(rule, sample.target)
            squares = outer_products.pooled_square_sums(
                factors, rows, in_table=in_table, by_sorting=by_sorting
            )
        else:
            squares = outer_products.one_hot_square_sums(
                factors, rows, apart=rule.apart, by_sorting=by_sorting
            )
        return at.into_w(), rule.assemble(squares, at.w.shape)
    if rule.positions == 1:  # (left ⊗ right)² = left² ⊗ right²
        factors = rule.factors(*at.operands)
        if forms.rounds_alike(at.equation, sample.target):
            factors = outer_products.rounded(factors)
        return at.into_w(), rule.assemble(outer_products.square_sums(factors), at.w.shape)

    def block(operands: PyTree) -> tuple[PyTree, PyTree]:
        pieces = _gradients_in_pieces(sample.target, at.equation, rule, operands)
        return (pieces, tuple(map(jnp.square, pieces))), ()

    needed = forms.norm_bytes(at.equation, rule, sample.target, direct=True)
    (total, squares), _ = sum_in_cache(block, at.operands, needed, sample.target)
    squares = rule.assemble(jnp.concatenate(squares, axis=-2), at.w.shape)
    return at.assembled(rule, total), squares


def _gradients_in_pieces(
    target: Target, equation: jaxprs.Equation, rule: Rule, operands: tuple[PyTree, jax.Array]
) -> tuple[jax.Array, ...]:
    """Gradients of some examples, cut along p: arrays (examples, groups, part of p, q).

    They are rounded as the model's are, for their sum is the gradient of the batch.
    """
    precision = outer_products.model_precision(equation)
    if convolution.is_depthwise(equation):
        return (convolution.gradients_by_entry(equation, *operands),)
    if forms.goes_by_row(equation, target):
        return convolution.pieces_by_row(equation, *operands, precision)
    factors = rule.factors(*operands)
    return (outer_products.gradients(factors, rule.sizes()[2], precision),)


def _operands(
    sample: Sample, rule: Rule, at: Residuals
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Gradient of the batch, and what the examples' gradients are made of."""
    return at.into_w(), at.operands


def _factors(
    sample: Sample, rule: Rule, at: Residuals
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Gradient of the batch and the factors of the examples' gradients."""
    left, right = rule.factors(*at.operands)
    # Only floating-point slots have a cotangent; whole numbers up to 2²⁴ survive the cast.
    return at.into_w(), (left.astype(jnp.float32) if rule.one_hot else left, right)


def _gradients(sample: Sample, rule: Rule, at: Residuals) -> tuple[jax.Array, jax.Array]:
    """The examples' gradients; that of the batch is their sum, taken at the end."""
    return jnp.zeros_like(at.w), gradients(sample.target, at.equation, rule, at.operands)


def gradients(
    target: Target, equation: jaxprs.Equation, rule: Rule, operands: tuple[PyTree, jax.Array]
) -> jax.Array:
    """Gradients of some examples with respect to the weight w at a site, (examples, *w.shape)."""
    pieces = _gradients_in_pieces(target, equation, rule, operands)
    joined = jnp.concatenate(pieces, axis=-2)  # (examples, groups, p, q)
    return rule.assemble(joined, equation.invars[rule.operand].aval.shape)
