"""The gradient of a convolution's filter, with the norm of each example's part of it."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cabs_jax.moments import convolution, jaxprs
from cabs_jax.moments.factored.kernels.dense import (
    LANES,
    READ_BYTES,
    costs,
    divisor,
    passes,
    vmem_limit,
    whole,
)

LARGEST_SCRATCH = 4 * 2**20  # bytes
LARGEST_CODE = 2048  # passes through the matrix unit for one example


class Layout(NamedTuple):
    """Images and outputs as rows of pixels, one image row after another in the same distance.

    An output and what it sees through one entry of the kernel are then always as far apart. What is
    seen above and below the image is zero; what would be seen beside it lies in another row.

    Attributes:
      width: Distance of two image rows.
      seen: Pixels of an image.
      pixels: Of all outputs.
      shifts: From an output to what it sees through each entry of the kernel, in pixels.
      columns: The same from column to column.
    """

    width: int
    seen: int
    pixels: int
    shifts: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def before(self) -> int:
        """Zeros before the image, in whole lanes."""
        return whole(max(-min(self.shifts), 0), LANES)

    @property
    def extent(self) -> int:
        """Pixels of an image with zeros before and after it."""
        last = whole(self.pixels, LANES) + max(self.shifts)
        return self.before + whole(max(self.seen, last), LANES)


def layout(g: convolution.Geometry, image: tuple[int, ...]) -> Layout:
    """How a convolution with strides of 1 of an image is laid out."""
    width = max(image[1], g.output[1])
    entries = [
        [i * d - low for i, d, (low, _) in zip(entry, g.rhs_dilation, g.padding, strict=True)]
        for entry in itertools.product(*map(range, g.kernel))
    ]
    shifts = tuple(down * width + across for down, across in entries)
    columns = tuple(across for _, across in entries)
    return Layout(width, image[0] * width, g.output[0] * width, shifts, columns)


def covers(equation: jaxprs.Equation) -> bool:
    """Whether the kernel is for a convolution: one image, strides of 1, not too large."""
    if not convolution.goes_by_row(equation):
        return False
    g = convolution.geometry_of(equation)
    if g.batch != 1 or g.strides != (1, 1):
        return False
    pixels, entries = math.prod(g.output), math.prod(g.kernel) * g.channels
    fits = 4 * whole(pixels, LANES) * max(entries, whole(g.filters, 8)) <= LARGEST_SCRATCH
    return fits and passes(entries, g.filters, pixels) <= LARGEST_CODE


def filter_gradient(
    equation: jaxprs.Equation,
    x: jax.Array,
    cotangent: jax.Array,
    precision: lax.Precision | None,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """Sum over examples of the gradients of a filter, and the squared norm of each.

    The image and the cotangent of an example are read into VMEM. There each entry of the kernel
    sees the image shifted by a number of pixels; of these follows the gradient, in one product over
    the pixels, which is added to the sum and squared.

    Args:
      equation: The convolution of one example; one that the kernel `covers`.
      x: Its input with a leading axis of examples, float32 or bfloat16.
      cotangent: The cotangents of its output, likewise.
      precision: Of the products.
      interpret: Whether, or with what checks, to run on any machine, slowly.

    Returns:
      The sum, float32, shape (1, kernel entries · channels, filters), and the norms, float32, shape
      (examples,).
    """
    lhs_spec, _, out_spec = equation.params["dimension_numbers"]
    g = convolution.geometry_of(equation)
    image = convolution.channels_last(x, lhs_spec, lead=1)[:, 0]  # (m, height, width, channels)
    out = convolution.channels_last(cotangent, out_spec, lead=1)[:, 0]
    at, examples = layout(g, image.shape[1:3]), x.shape[0]
    left, right = _pixels_last(image, at.width), _pixels_last(out, at.width)
    entries, pixels = len(at.shifts) * g.channels, whole(at.pixels, LANES)
    nbytes = 4 * max(g.channels * at.seen, g.filters * at.pixels)
    at_once = divisor(examples, min(READ_BYTES // nbytes, 16))
    buffers = 4 * READ_BYTES + 4 * entries * (pixels + 2 * whole(g.filters, LANES))
    shaped = functools.partial(jaxprs.shape_varying_like, operands=(x, cotangent))
    total, norms = pl.pallas_call(
        functools.partial(_kernel, at, precision),
        grid=(examples // at_once,),
        in_specs=[
            pl.BlockSpec((at_once, g.channels, at.seen), lambda e: (e, 0, 0)),
            pl.BlockSpec((at_once, g.filters, at.pixels), lambda e: (e, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((entries, g.filters), lambda e: (0, 0)),
            pl.BlockSpec((1, examples), lambda e: (0, 0), memory_space=pltpu.SMEM),
        ],
        out_shape=[
            shaped((entries, g.filters), jnp.float32),
            shaped((1, examples), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((g.channels, at.extent), jnp.float32),
            pltpu.VMEM((entries, pixels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit(buffers)
        ),
        **costs(
            products=2 * examples * math.prod(g.output) * entries * g.filters,
            elementwise=examples * entries * (3 * g.filters + at.pixels),
            nbytes=left.nbytes + right.nbytes + 4 * entries * g.filters,
        ),
        interpret=interpret,
        name="filter_gradient",
    )(left, right)
    return total[None], norms[0]


def _pixels_last(x: jax.Array, width: int) -> jax.Array:
    """Lays images (m, height, width, channels) out as (m, channels, pixels)."""
    if x.shape[2] < width:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, width - x.shape[2]), (0, 0)])
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)


def _kernel(
    at: Layout,
    precision: lax.Precision | None,
    left: Any,
    right: Any,
    total: Any,
    norms: Any,
    image: Any,
    patches: Any,
) -> None:
    """Adds the gradients of some examples to the sum, and writes their norms."""
    step, (at_once, channels, _) = pl.program_id(0), left.shape
    pixels = patches.shape[1]  # in whole lanes, which are faster to move
    column = lax.broadcasted_iota(jnp.int32, (channels, pixels), 1) % at.width
    beside = {a: (column < -a) | (column >= at.width - a) for a in set(at.columns) if a}

    @pl.when(step == 0)
    def start() -> None:
        total[...] = jnp.zeros_like(total)
        image[...] = jnp.zeros_like(image)

    def of_example(e: jax.Array, carry: None) -> None:
        image[:, at.before : at.before + at.seen] = left[e].astype(jnp.float32)
        extended = image[...]
        for entry, (shift, across) in enumerate(zip(at.shifts, at.columns, strict=True)):
            first = at.before + shift
            seen = extended[:, first : first + pixels]
            seen = jnp.where(beside[across], 0.0, seen) if across else seen
            patches[entry * channels : (entry + 1) * channels, :] = seen
        g = lax.dot_general(
            patches[:, : at.pixels],
            right[e].astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision,
            preferred_element_type=jnp.float32,
        )
        total[...] += g
        norms[0, step * at_once + e] = jnp.sum(g * g)

    lax.fori_loop(0, at_once, of_example, None)
