"""Per-example arrays that are sums of products of smaller ones, and linear functions of them.

The gradient of an example with respect to a weight, Σ_t left_t ⊗ right_t, has p·q entries and is
made of t·(p + q) numbers. A function of parameters pulls it back step by step, by linear equations,
and most of these keep that form: a product with a constant is one more factor, a sum over an axis a
contraction of the factors that run along it, a transpose one of each factor. So gradients are
followed through them without being written out, and their norms are contractions of the factors.
Where an equation does not keep the form, the array is written out, as a product of one factor.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import views
from cabs_jax.moments.factored.values import slot_dtype


class Product(NamedTuple):
    """Σ_t Π_f factor_f, one array for each example.

    Attributes:
      factors: Float32 arrays (complex64 within a Fourier transform, say) with the axes of the
        shape, of size one where the factor is the same throughout. Those that are not constants
        have two more in front, for examples and for positions t.
      shape: The shape of the array of one example.
    """

    factors: tuple[jax.Array, ...]
    shape: tuple[int, ...]


Products: TypeAlias = tuple[Product, ...]  # added up
ENTRYWISE = {"div", "mul", "select_n", "sub", *views.ADDING}
Vmap: TypeAlias = Callable[..., Any]


def written_out(x: jax.Array) -> Products:
    """Arrays of the examples, shape (examples, *shape), as they are."""
    return (Product((_wide(x)[:, None],), x.shape[1:]),)


def norms(products: Products, examples: int) -> jax.Array:
    """Squared norms, float32, shape (examples,)."""
    return jnp.broadcast_to(_squared(products, (0,)).reshape(-1), (examples,))


def square_sums(products: Products, shape: tuple[int, ...]) -> jax.Array:
    """The squares of the entries, summed over the examples, float32."""
    return jnp.broadcast_to(_squared(products, range(1, len(shape) + 1))[0, 0], shape)


def _squared(products: Products, kept: Collection[int]) -> jax.Array:
    """The square of the sum of some products, summed over all axes but those kept."""
    total = jnp.zeros((1,) * (2 + len(products[0].shape) if products else 2), jnp.float32)
    for i, one in enumerate(products):
        for other in products[:i]:
            total = total + 2 * _contracted([one, other], kept)
        total = total + _contracted([one, one], kept)
    # Of a projection, the terms cancel: where nothing is left of it, rounding must not go below 0.
    return jnp.maximum(total, 0)


def follow(
    jaxpr: jaxprs.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], vmap: Vmap
) -> list[Any]:
    """Evaluates a jaxpr that is linear in those of its inputs that are products.

    Args:
      jaxpr: The jaxpr, for one example.
      consts: Its constants.
      inputs: Products, or arrays that are the same for all examples.
      vmap: How other equations are mapped over the examples.

    Returns:
      Products, or an array where an output does not depend on any, and so is zero.
    """

    def visit(equation: jaxprs.Equation, operands: list[Any]) -> Sequence[Any]:
        if not any(isinstance(operand, tuple) for operand in operands):
            return jaxprs.evaluate(equation, operands)
        if jaxprs.name(equation) in jaxprs.CALLS:
            return follow(*jaxprs.inner_jaxpr(equation), operands, vmap)
        return _through(equation, operands, vmap)

    return jaxprs.walk(jaxpr, consts, inputs, jaxpr.eqns, visit, lambda constant: constant)


def _through(equation: jaxprs.Equation, operands: list[Any], vmap: Vmap) -> list[Products]:
    name, shape = jaxprs.name(equation), equation.outvars[0].aval.shape
    known = {i: operand for i, operand in enumerate(operands) if isinstance(operand, tuple)}
    if name in ENTRYWISE:  # a scalar is there for all entries
        known = {i: tuple(_whole(one, shape) for one in products) for i, products in known.items()}
    # By linearity, what products are added to or selected from is zero where it is a constant.
    if name in views.ADDING:
        return [_added_up(known.values())]
    if name == "sub":
        return [_added_up(_all_times(known[place], 1 - 2 * place) for place in known)]
    if name == "select_n" and 0 not in known:
        case = jnp.asarray(operands[0]).astype(jnp.int32)
        return [_added_up(_all_times(known[place], case == place - 1) for place in known)]
    if len(known) == 1:
        ((place, products),) = known.items()
        step = _step(equation, place, operands)
        if step is not None:
            return [tuple(map(step, products))]
    avals = [v.aval for v in equation.invars]
    arrays = [
        entries(operand).astype(aval.dtype) if i in known else operand
        for i, (operand, aval) in enumerate(zip(operands, avals, strict=True))
    ]
    axes = [0 if i in known else None for i in range(len(operands))]
    outputs = vmap(lambda *own: jaxprs.evaluate(equation, own), axes)(*arrays)
    return [written_out(output) for output in outputs]


def _step(
    equation: jaxprs.Equation, place: int, operands: list[Any]
) -> Callable[[Product], Product] | None:
    """What an equation does to a product at one of its operands, if it keeps the form."""
    name, params, shape = jaxprs.name(equation), equation.params, equation.outvars[0].aval.shape
    if views.keeps_entries(equation):
        return lambda product: product
    if name == "neg":
        return lambda product: _times(product, -1.0)
    if name == "mul" or (name == "div" and place == 0):
        other = _wide(operands[1 - place])
        return lambda product: _times(product, other if name == "mul" else 1 / other)
    if name == "reduce_sum":
        return lambda product: _summed(product, params["axes"])
    if name == "transpose":
        return lambda product: _transposed(product, params["permutation"])
    if name == "broadcast_in_dim":
        return lambda product: _spread(product, shape, params["broadcast_dimensions"])
    if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        return _reshape(equation.invars[0].aval.shape, shape)
    if name == "slice":
        return lambda product: _sliced(product, shape, params)
    if name == "pad" and place == 0:
        return lambda product: _padded(product, shape, params["padding_config"])
    if name == "dot_general":
        return lambda product: _multiplied(product, place, operands[1 - place], params)
    return None


def _added_up(parts: Iterable[Products]) -> Products:
    """Adds up: products of factors along the same axes are one, with the positions of both."""
    alike: dict[Any, list[Product]] = {}
    for product in itertools.chain.from_iterable(parts):
        # Constants can be told to be equal only where they are the same array.
        factors = [(_sizes(f, product), id(f) * _is_constant(f, product)) for f in product.factors]
        alike.setdefault((product.shape, *factors), []).append(product)
    return tuple(map(_joined, alike.values()))


def _joined(products: list[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    examples = max(_counts(product)[0] for product in products)

    def joined(factors: tuple[jax.Array, ...]) -> jax.Array:
        if _is_constant(factors[0], products[0]):
            return factors[0]
        whole = [
            jnp.broadcast_to(factor, (examples, _counts(product)[1], *factor.shape[2:]))
            for factor, product in zip(factors, products, strict=True)
        ]
        return jnp.concatenate(whole, axis=1)

    columns = zip(*(product.factors for product in products), strict=True)
    return _without_positions(products[0]._replace(factors=tuple(map(joined, columns))))


def _sizes(factor: jax.Array, product: Product) -> tuple[int, ...]:
    """The sizes of a factor along the axes of the shape."""
    return factor.shape[factor.ndim - len(product.shape) :]


def _is_constant(factor: jax.Array, product: Product) -> bool:
    return factor.ndim == len(product.shape)


def _counts(product: Product) -> tuple[int, int]:
    """The numbers of examples and of positions, 1 where all factors are the same for all."""
    counts = [f.shape[:2] for f in product.factors if not _is_constant(f, product)]
    examples, positions = (max(counts, default=1) for counts in zip(*counts, strict=True))
    return examples, positions


def _mapped(
    product: Product, function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]
) -> Product:
    """Does the same to all factors, on the axes of the shape alone."""
    of_examples = jax.vmap(jax.vmap(function))
    factors = [function(f) if _is_constant(f, product) else of_examples(f) for f in product.factors]
    return Product(tuple(factors), shape)


def _whole(product: Product, shape: tuple[int, ...]) -> Product:
    return product if len(product.shape) == len(shape) else _spread(product, shape, ())


def _times(product: Product, constant: Any) -> Product:
    """Entries times constants, of the same shape or one for all."""
    constant = _wide(constant)
    if constant.ndim < len(product.shape):
        constant = constant.reshape((1,) * len(product.shape))
    return product._replace(factors=(*product.factors, constant))


def _all_times(products: Products, constant: Any) -> Products:
    return tuple(_times(product, constant) for product in products)


def _summed(product: Product, axes: Sequence[int]) -> Product:
    """Sums over some axes."""
    along = [f for f in product.factors if any(_sizes(f, product)[axis] > 1 for axis in axes)]
    others = [f for f in product.factors if not any(f is one for one in along)]
    kept = [axis for axis in range(len(product.shape)) if axis not in axes]
    # Positions are not added up yet: that would undo the product.
    left = 0, *(axis + 1 for axis in kept)
    sums = _contracted([product._replace(factors=tuple(along))], left, positions=True)
    shape = tuple(product.shape[axis] for axis in kept)
    whole = product._replace(factors=(*others, sums))
    return _without_positions(_mapped(whole, lambda x: jnp.squeeze(x, tuple(axes)), shape))


def _without_positions(product: Product) -> Product:
    """Sums over positions, if that makes no more numbers than there are."""
    long = [f for f in product.factors if not _is_constant(f, product) and f.shape[1] > 1]
    rest = [f for f in product.factors if not any(f is one for one in long)]
    sizes = zip(*(_sizes(f, product) for f in long), strict=True)
    if not long or math.prod(map(max, sizes)) > sum(math.prod(f.shape[1:]) for f in long):
        return product
    sums = _contracted([product._replace(factors=tuple(long))], range(len(product.shape) + 1))
    return product._replace(factors=(*rest, sums))


def _transposed(product: Product, order: Sequence[int]) -> Product:
    shape = tuple(product.shape[axis] for axis in order)
    return _mapped(product, lambda x: x.transpose(order), shape)


def _spread(product: Product, shape: tuple[int, ...], places: Sequence[int]) -> Product:
    """Puts the axes to some places of a shape, and repeats entries along the others."""
    new = [axis for axis in range(len(shape)) if axis not in places]
    return _mapped(product, lambda x: jnp.expand_dims(x, new), shape)


def _reshape(old: tuple[int, ...], new: tuple[int, ...]) -> Callable[[Product], Product] | None:
    """A reshape that does no more than add and drop axes of size one."""
    if [n for n in old if n > 1] != [n for n in new if n > 1]:
        return None

    def reshaped(factor: jax.Array) -> jax.Array:
        sizes = iter([size for n, size in zip(old, factor.shape, strict=True) if n > 1])
        return factor.reshape([next(sizes) if n > 1 else 1 for n in new])

    return lambda product: _mapped(product, reshaped, new)


def _sliced(product: Product, shape: tuple[int, ...], params: dict[str, Any]) -> Product:
    strides = params["strides"] or (1,) * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    parts = [slice(*each) for each in bounds]

    def cut(factor: jax.Array) -> jax.Array:
        sizes = zip(parts, factor.shape, strict=True)
        return factor[tuple(part if size > 1 else slice(None) for part, size in sizes)]

    return _mapped(product, cut, shape)


def _padded(
    product: Product, shape: tuple[int, ...], config: Sequence[tuple[int, int, int]]
) -> Product:
    def padded(factor: jax.Array, along: Sequence[bool]) -> jax.Array:
        edges = [edge if one else (0, 0, 0) for edge, one in zip(config, along, strict=True)]
        return lax.pad(factor, jnp.zeros((), factor.dtype), edges)

    # Along an axis that no factor runs along, this one is zero where padding is.
    sizes = [n if any(edge) else 1 for n, edge in zip(product.shape, config, strict=True)]
    inside = padded(jnp.ones(sizes, jnp.float32), [True] * len(sizes))
    wide = _mapped(product, lambda x: padded(x, [size > 1 for size in x.shape]), shape)
    return _times(wide, inside)


def _multiplied(product: Product, place: int, constant: Any, params: dict[str, Any]) -> Product:
    """A product with a constant, as `dot_general` makes it: spread out, multiplied, and summed."""
    contracting, batching = params["dimension_numbers"]
    summed, stepped = contracting[place], batching[place]
    rank, constant = len(product.shape), _wide(constant)
    paired = dict(
        zip((*contracting[1 - place], *batching[1 - place]), (*summed, *stepped), strict=True)
    )
    free = [axis for axis in range(constant.ndim) if axis not in paired]
    # The axes of the product come first, then those that the constant alone has.
    placed = paired | {axis: rank + i for i, axis in enumerate(free)}
    shape = (*product.shape, *(constant.shape[axis] for axis in free))
    order = sorted(placed, key=placed.__getitem__)
    missing = [axis for axis in range(len(shape)) if axis not in placed.values()]
    aligned = jnp.expand_dims(constant.transpose(order), missing)
    wide = _spread(product, shape, range(rank))
    sums = _summed(wide._replace(factors=(*wide.factors, aligned)), summed)
    own = [axis for axis in range(rank) if axis not in summed and axis not in stepped]
    added = list(range(rank, len(shape)))
    output = [*stepped, *own, *added] if place == 0 else [*stepped, *added, *own]
    left = [axis for axis in range(len(shape)) if axis not in summed]
    return _transposed(sums, [left.index(axis) for axis in output])


def _wide(x: Any) -> jax.Array:
    wide: jax.Array = jnp.asarray(x, slot_dtype(jnp.result_type(x)))
    return wide


def entries(products: Products) -> jax.Array:
    """The arrays of the examples, (examples, *shape)."""
    shape = products[0].shape
    parts = [_contracted([product], range(len(shape) + 1)) for product in products]
    total = functools.reduce(jnp.add, parts)
    return jnp.broadcast_to(total[:, 0], (total.shape[0], *shape))


def _contracted(
    products: Sequence[Product], kept: Collection[int], *, positions: bool = False
) -> jax.Array:
    """Sums the product of several products over all axes but some, and over positions.

    Axis 0 is that of the examples, those of the shape come next. Returns an array laid out like a
    factor, in which the axes that are summed over have size one.
    """
    shape = products[0].shape
    rank = len(shape)
    factors = [factor for product in products for factor in product.factors]
    dtype = jnp.complex64 if any(map(jnp.iscomplexobj, factors)) else jnp.float32
    operands: dict[tuple[int, ...], jax.Array] = {}
    sizes: dict[int, int] = {}
    for number, product in enumerate(products):
        for factor in product.factors:
            # Positions come last, those of every product on an axis of their own.
            whole = factor[None, None] if _is_constant(factor, product) else factor
            laid_out = jnp.moveaxis(whole, 1, -1)
            axes = (*range(rank + 1), rank + 1 + number)
            own = {a: n for a, n in zip(axes, laid_out.shape, strict=True) if n > 1}
            key = tuple(own)
            laid_out = laid_out.reshape(tuple(own.values())).astype(dtype)
            # Those that run along the same axes are multiplied at once.
            operands[key] = operands[key] * laid_out if key in operands else laid_out
            sizes |= own
    kept = {*kept, rank + 1} if positions else set(kept)
    output = sorted(kept & sizes.keys())
    arguments = [part for key, x in operands.items() for part in (x, key)]
    total = jnp.ones((), dtype)
    if operands:
        total = jnp.einsum(*arguments, output, precision=lax.Precision.HIGHEST)
    repeated = [n for a, n in enumerate(shape, 1) if a not in sizes and a not in kept]
    laid_out = total.reshape([sizes.get(a, 1) if a in kept else 1 for a in range(rank + 2)])
    return jnp.moveaxis(laid_out, -1, 1) * jnp.asarray(math.prod(repeated), dtype)
