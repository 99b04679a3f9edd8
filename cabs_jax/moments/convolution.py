"""Convolutions as patches and a matrix product.

The gradient of a convolution's filter, one example at a time, is a convolution of two operands that
both belong to the example. vmap turns that into a grouped convolution, which XLA's partitioner
computes wrongly when the examples are split over devices, and which is slow on every backend.
Patches and a matrix product are right everywhere.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


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


def patches(lhs: jax.Array, g: Geometry) -> jax.Array:
    """Cuts the input of a convolution into what each output position sees.

    Args:
      lhs: Input with its dimensions in the order (batch, *spatial, groups · channels).
      g: The convolution.

    Returns:
      Patches of shape (batch, positions, kernel entries, groups · channels).
    """
    zero = jnp.zeros((), lhs.dtype)
    interior = [d - 1 for d in g.lhs_dilation]
    config = [
        (0, 0, 0),
        *((lo, hi, i) for (lo, hi), i in zip(g.padding, interior, strict=True)),
        (0, 0, 0),
    ]
    lhs = lax.pad(lhs, zero, config)
    # One strided slice for each kernel entry, or one for each output: whichever are fewer.
    by_kernel = math.prod(g.kernel) <= math.prod(g.output)
    looped, within = (g.kernel, g.output) if by_kernel else (g.output, g.kernel)
    step, stride = (g.rhs_dilation, g.strides) if by_kernel else (g.strides, g.rhs_dilation)
    pieces = []
    for index in itertools.product(*map(range, looped)):
        start = [i * s for i, s in zip(index, step, strict=True)]
        limit = [a + (n - 1) * s + 1 for a, n, s in zip(start, within, stride, strict=True)]
        piece = lax.slice(
            lhs,
            (0, *start, 0),
            (lhs.shape[0], *limit, lhs.shape[-1]),
            (1, *stride, 1),
        )
        pieces.append(piece.reshape(lhs.shape[0], math.prod(within), lhs.shape[-1]))
    return jnp.stack(pieces, axis=2 if by_kernel else 1)


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
    """Splits batch groups into convolutions of their own: group k of the batch, of the filters."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    groups = params["batch_group_count"]
    single = {**params, "batch_group_count": 1}
    return jnp.concatenate(
        [
            convolve(left, right, **single)
            for left, right in zip(
                jnp.split(lhs, groups, axis=lhs_spec[0]),
                jnp.split(rhs, groups, axis=rhs_spec[0]),
                strict=True,
            )
        ],
        axis=out_spec[1],
    )
