"""Convolutions as patches and a matrix product.

The gradient of a convolution's filter, one example at a time, is a convolution of two operands that
both belong to the example. vmap turns that into a grouped convolution, which XLA's partitioner
computes wrongly when the examples are split over devices, and which is slow on every backend.
Patches and a matrix product are right everywhere. On a TPU, where patches are slow to move about, a
convolution with a one-hot kernel makes them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES, SUBLANES = 128, 8  # a TPU keeps the last two axes of an array in tiles of this size


class Geometry(NamedTuple):
    """A convolution with the layout of its operands put aside.

    Attributes:
      batch: Images per example.
      channels: Input channels of one feature group.
      groups: Feature groups.
      filters: Output channels of one feature group.
      kernel: Spatial shape of the kernel.
      output: Spatial shape of the output.
      strides: Steps between outputs.
      padding: Low and high padding of the dilated input, which may be negative.
      lhs_dilation: Steps between inputs.
      rhs_dilation: Steps between kernel entries.
    """

    batch: int
    channels: int
    groups: int
    filters: int
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]


def geometry(lhs_shape: Any, rhs_shape: Any, out_shape: Any, params: dict[str, Any]) -> Geometry:
    """Reads the geometry of a `conv_general_dilated` off its shapes and parameters."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    groups = params["feature_group_count"]
    return Geometry(
        batch=lhs_shape[lhs_spec[0]],
        channels=lhs_shape[lhs_spec[1]] // groups,
        groups=groups,
        filters=rhs_shape[rhs_spec[0]] // groups,
        kernel=tuple(rhs_shape[d] for d in rhs_spec[2:]),
        output=tuple(out_shape[d] for d in out_spec[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        lhs_dilation=tuple(params["lhs_dilation"]),
        rhs_dilation=tuple(params["rhs_dilation"]),
    )


def geometry_of(equation: Any) -> Geometry:
    """The geometry of a convolution's equation."""
    lhs, rhs, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    return geometry(lhs, rhs, out, equation.params)


def patches(lhs: jax.Array, g: Geometry) -> jax.Array:
    """Cuts the input of a convolution into what each output position sees.

    Args:
      lhs: Input with its dimensions in the order (batch, *spatial, groups · channels).
      g: The convolution.

    Returns:
      Patches of shape (batch, positions, kernel entries, groups · channels).
    """
    positions, entries = math.prod(g.output), math.prod(g.kernel)
    if len(g.kernel) > 1 and entries <= positions:
        # What is between two stacks goes through the memory of a GPU; one stack is one kernel.
        cut: jax.Array = lax.platform_dependent(
            lhs, cuda=lambda x: cut_at_once(x, g), default=lambda x: cut_by_axes(x, g)
        )
    else:
        cut = cut_by_axes(lhs, g)
    return cut.reshape(lhs.shape[0], positions, entries, lhs.shape[-1])


def cut_at_once(lhs: jax.Array, g: Geometry) -> jax.Array:
    """Patches in the shape (batch, *output, *kernel, channels), a slice for each entry."""
    cut = jnp.stack(_seen_by_entries(lhs, g), axis=-2)
    return cut.reshape(lhs.shape[0], *g.output, *g.kernel, lhs.shape[-1])


def cut_by_axes(lhs: jax.Array, g: Geometry) -> jax.Array:
    """Patches in the shape (batch, *output, *kernel, channels), along one axis after the other.

    That takes fewer slices than one for each entry of the kernel. The last axis comes first, so
    that longer rows are moved in the next.
    """
    cut, spatial = _padded(lhs, g), len(g.kernel)
    for axis in reversed(range(spatial)):
        size, outputs = g.kernel[axis], g.output[axis]
        stride, dilation = g.strides[axis], g.rhs_dilation[axis]
        by_entry = size <= outputs  # a slice for each entry or one for each output
        number, step = (size, dilation) if by_entry else (outputs, stride)
        length, stride = (outputs, stride) if by_entry else (size, dilation)
        pieces = [
            lax.slice_in_dim(cut, i * step, i * step + (length - 1) * stride + 1, stride, 1 + axis)
            for i in range(number)
        ]
        # To (batch, *spatial, *kernel from this axis on, channels).
        if by_entry:
            cut = jnp.stack(pieces, axis=1 + spatial)
        else:
            cut = jnp.moveaxis(jnp.stack(pieces, axis=1 + axis), 2 + axis, 1 + spatial)
    return cut


def _padded(lhs: jax.Array, g: Geometry) -> jax.Array:
    """The input (batch, *spatial, channels) with its padding, and zeros where it is dilated."""
    between = zip(g.padding, g.lhs_dilation, strict=True)
    config = [(0, 0, 0), *((low, high, d - 1) for (low, high), d in between), (0, 0, 0)]
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), config)


def _seen_by_entries(lhs: jax.Array, g: Geometry) -> list[jax.Array]:
    """What each entry of the kernel meets, (batch, *output, channels)."""
    lhs, pieces = _padded(lhs, g), []
    for index in itertools.product(*map(range, g.kernel)):
        start = [i * d for i, d in zip(index, g.rhs_dilation, strict=True)]
        limit = [a + (n - 1) * s + 1 for a, n, s in zip(start, g.output, g.strides, strict=True)]
        low, high = (0, *start, 0), (lhs.shape[0], *limit, lhs.shape[-1])
        pieces.append(lax.slice(lhs, low, high, (1, *g.strides, 1)))
    return pieces


def is_depthwise(equation: Any) -> bool:
    """Whether an equation is a convolution that keeps its input channels apart."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    groups, spec = equation.params["feature_group_count"], equation.params["dimension_numbers"][0]
    return bool(groups > 1 and equation.invars[0].aval.shape[spec[1]] == groups)


def gradients_by_entry(equation: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Gradients of a depthwise filter for each example, one entry of the kernel after the other.

    With one input channel to a group there is nothing for a matrix product to share: each entry is
    a sum over positions of image times cotangent, which needs no patches in memory.

    Args:
      equation: The convolution, of one example; one that `is_depthwise`.
      x: Its input with a leading axis of examples.
      cotangent: The cotangents of its output, likewise.

    Returns:
      Gradients of shape (examples, groups, kernel entries, filters of a group), float32.
    """
    lhs_spec, _, out_spec = equation.params["dimension_numbers"]
    g = geometry_of(equation)
    x, cotangent = channels_last(x, lhs_spec, lead=1), channels_last(cotangent, out_spec, lead=1)
    examples, images = x.shape[0], x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
    right = cotangent.reshape(examples, g.batch, *g.output, g.groups, g.filters)
    summed = tuple(range(1, right.ndim - 2))

    def piece(seen: jax.Array) -> jax.Array:
        left = seen.reshape(examples, g.batch, *g.output, g.groups, 1)
        return jnp.sum(left * right.astype(jnp.float32), axis=summed)[:, :, None]

    return jnp.concatenate([piece(seen) for seen in _seen_by_entries(images, g)], axis=2)


def goes_by_row(equation: Any) -> bool:
    """Whether `pieces_by_row` covers a convolution: of images, without groups or dilated input."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    params = equation.params
    return bool(params["feature_group_count"] == 1 and params["lhs_dilation"] == (1, 1))


def pieces_by_row(
    equation: Any, x: jax.Array, cotangent: jax.Array, precision: lax.Precision | None
) -> tuple[jax.Array, ...]:
    """Gradients of a filter for each example, in pieces: one for each row of the kernel.

    Patches hold every pixel as often as the kernel has entries, and are moved about in memory to be
    laid out. Here only what one row of the kernel sees is unfolded, by a convolution with a one-hot
    kernel, which a matrix unit does on the way; the rows of the kernel differ in which rows of that
    they meet. Where there are few channels, all rows of the kernel are unfolded at once.

    Args:
      equation: The convolution, of one example; one that `goes_by_row`.
      x: Its input with a leading axis of examples.
      cotangent: The cotangents of its output, likewise.
      precision: Of the products.

    Returns:
      Pieces of shape (examples, 1, rows · width · channels, filters), in the order of the rows.
    """
    lhs_spec, _, out_spec = equation.params["dimension_numbers"]
    g = geometry_of(equation)
    x, cotangent = channels_last(x, lhs_spec, lead=1), channels_last(cotangent, out_spec, lead=1)
    (height, width), (out_height, out_width) = g.kernel, g.output
    at_once = height if height * width * g.channels <= LANES else 1
    entries = at_once * width * g.channels
    # Rows of whole sublanes merge into positions without a copy; what is added meets zeros.
    added = -out_width % SUBLANES if at_once < height else 0
    low, high = g.padding[1]
    unfolded = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        jnp.eye(entries, dtype=x.dtype).reshape(at_once, width, g.channels, entries),
        window_strides=(g.strides[0] if at_once == height else 1, g.strides[1]),
        padding=(g.padding[0], (low, high + added * g.strides[1])),
        rhs_dilation=g.rhs_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    unfolded = unfolded.reshape(*x.shape[:2], *unfolded.shape[1:])

    def product(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
        piece: jax.Array = jnp.einsum(
            formula, left, right, precision=precision, preferred_element_type=jnp.float32
        )
        return piece[:, None]

    if at_once == height:
        return (product("bnhwp,bnhwq->bpq", unfolded, cotangent),)
    cotangent = jnp.pad(cotangent, [(0, 0)] * 3 + [(0, added), (0, 0)])
    right = cotangent.reshape(*x.shape[:2], -1, g.filters)  # (examples, batch, positions, filters)
    step, wide = g.strides[0], out_width + added
    if step == 1:  # (examples, batch, rows · wide, entries)
        unfolded = unfolded.reshape(*x.shape[:2], -1, entries)

    def seen_by(row: int) -> jax.Array:
        first = row * g.rhs_dilation[0]
        if step == 1:
            return lax.slice_in_dim(unfolded, first * wide, (first + out_height) * wide, axis=2)
        last = first + (out_height - 1) * step
        rows = lax.slice_in_dim(unfolded, first, last + 1, step, axis=2)
        return rows.reshape(*x.shape[:2], -1, entries)

    return tuple(product("bntp,bntq->bpq", seen_by(row), right) for row in range(height))


def channels_last(x: jax.Array, spec: tuple[int, ...], lead: int = 0) -> jax.Array:
    """Moves an operand's dimensions into the order (*leading, batch, *spatial, channels)."""
    order = (spec[0], *spec[2:], spec[1])
    return x.transpose((*range(lead), *(lead + d for d in order)))


def convolve(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """Computes `conv_general_dilated` from patches and a matrix product, in any layout."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    if params["batch_group_count"] > 1:
        return _batch_grouped(lhs, rhs, params)
    out = jax.eval_shape(lambda a, b: lax.conv_general_dilated_p.bind(a, b, **params), lhs, rhs)
    g = geometry(lhs.shape, rhs.shape, out.shape, params)
    cut = patches(channels_last(lhs, lhs_spec), g)
    cut = cut.reshape(*cut.shape[:3], g.groups, g.channels)  # (n, positions, kernel, groups, c)
    kernel = rhs.transpose((rhs_spec[0], *rhs_spec[2:], rhs_spec[1]))
    kernel = kernel.reshape(g.groups, g.filters, math.prod(g.kernel), g.channels)
    product = jnp.einsum(
        "ntkgc,gqkc->ntgq",
        cut,
        kernel,
        precision=params["precision"],
        preferred_element_type=out.dtype,
    )
    product = product.reshape(g.batch, *g.output, g.groups * g.filters)
    position = {dim: i for i, dim in enumerate((out_spec[0], *out_spec[2:], out_spec[1]))}
    return product.transpose([position[d] for d in range(len(out.shape))])


def _batch_grouped(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """Convolves group k of the batch with group k of the filters, for all k at once."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    groups = params["batch_group_count"]
    single = {**params, "batch_group_count": 1}

    def split(x: jax.Array, axis: int) -> jax.Array:  # (groups · n) to (groups, n) at an axis
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    def of_group(left: jax.Array, right: jax.Array) -> jax.Array:
        return convolve(left, right, **single)

    axes, axis = (lhs_spec[0], rhs_spec[0]), out_spec[1]
    # In the output, groups and then the filters of each.
    out = jax.vmap(of_group, axes, axis)(split(lhs, axes[0]), split(rhs, axes[1]))
    return out.reshape(*out.shape[:axis], -1, *out.shape[axis + 2 :])
