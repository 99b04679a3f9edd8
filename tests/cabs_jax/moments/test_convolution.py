"""Convolutions as patches and a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from cabs_jax.moments import convolution
from cabs_jax.moments.convolution import channels_last, convolve
from tests.cabs_jax.moments.geometries import convolutions, numbers
from tests.cabs_jax.moments.oracle import assert_close


@pytest.mark.slow  # compiles many
@given(convolutions(batch_groups=True))
@settings(max_examples=15, deadline=None)
def test_a_convolution_of_every_kind_is_jaxs_own(geometry):
    lhs, rhs, options = geometry

    def convolution(x, w):
        return lax.conv_general_dilated(x, w, **options)

    x, w = numbers(*lhs), numbers(*rhs)
    (equation,) = jax.make_jaxpr(convolution)(x, w).eqns
    ours, wanted = jax.jit(lambda x, w: (convolve(x, w, **equation.params), convolution(x, w)))(
        x, w
    )
    assert_close(ours, wanted, 1e-5)


def _slices(x, g, platform):
    cut = jax.jit(lambda x: convolution.patches(x, g)).trace(x)
    return cut.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.slice")


@pytest.mark.parametrize(
    ("kernel", "output", "slices", "on_gpu"),
    [((5, 5), (8, 8), 10, 25), ((5, 5), (1, 8), 6, 6), ((4,), (8,), 4, 4)],
)
def test_patches_are_cut_along_one_axis_after_the_other_but_on_a_gpu_at_once(
    kernel, output, slices, on_gpu
):
    rank = len(kernel)
    size = tuple(k + n - 1 for k, n in zip(kernel, output, strict=True))
    ones = (1,) * rank
    g = convolution.Geometry(
        1, 2, 1, 3, kernel, output, ones, ((0, 0),) * rank, lhs_dilation=ones, rhs_dilation=ones
    )
    x = np.arange(2 * np.prod(size), dtype=np.float32).reshape(1, *size, 2)
    assert _slices(x, g, "cpu") == slices
    assert _slices(x, g, "cuda") == on_gpu
    seen = np.lib.stride_tricks.sliding_window_view(x, kernel, tuple(range(1, 1 + rank)))
    wanted = np.moveaxis(seen, 1 + rank, -1).reshape(1, np.prod(output), np.prod(kernel), 2)
    x = jnp.asarray(x)
    np.testing.assert_array_equal(convolution.patches(x, g), wanted)
    at_once, by_axes = convolution.cut_at_once(x, g), convolution.cut_by_axes(x, g)
    np.testing.assert_array_equal(at_once, by_axes)


def test_channels_last_behind_leading_axes():
    x = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    # (examples, then batch, channels, height, width)
    np.testing.assert_array_equal(
        channels_last(jax.numpy.asarray(x), (0, 1, 2, 3), lead=1), np.moveaxis(x, 2, -1)
    )


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
IMAGES = {  # layout, kernel, padding, strides, dilation of the kernel
    "as in the papers net": (LAST, (5, 5), ((2, 2), (2, 2)), (1, 1), (1, 1)),
    "strided": (LAST, (3, 3), ((0, 1), (1, 1)), (2, 3), (1, 1)),
    "dilated": (LAST, (3, 2), ((2, 2), (0, 1)), (1, 2), (2, 3)),
    "strided and dilated rows": (LAST, (2, 3), ((1, 2), (1, 0)), (3, 1), (2, 1)),
    "cropped": (LAST, (3, 3), ((-1, -1), (1, -2)), (1, 1), (1, 1)),
    "of one row": (LAST, (1, 4), ((0, 0), (3, 3)), (1, 1), (1, 1)),
    "channels first": (FIRST, (3, 4), ((1, 1), (2, 1)), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("lanes", [1, convolution.LANES], ids=["row by row", "at once"])
@pytest.mark.parametrize("name", IMAGES)
def test_gradients_by_row_are_those_of_the_filter(name, lanes, images, monkeypatch):
    monkeypatch.setattr(convolution, "LANES", lanes)
    layout, kernel, padding, strides, dilation = IMAGES[name]
    channels, filters, examples = 3, 2, 2

    def convolved(x, w):
        return lax.conv_general_dilated(
            x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=layout
        )

    first = layout is FIRST
    x = numbers(examples, images, *((channels, 7, 9) if first else (7, 9, channels)))
    w = numbers(*((filters, channels, *kernel) if first else (*kernel, channels, filters)))
    (equation,) = jax.make_jaxpr(convolved)(x[0], w).eqns
    cotangent = numbers(examples, *equation.outvars[0].aval.shape)

    @jax.jit
    def both(x, cotangent):
        assert convolution.goes_by_row(equation)
        pieces = convolution.pieces_by_row(equation, x, cotangent, None)
        assert len(pieces) == (1 if lanes > 1 or kernel[0] == 1 else kernel[0])
        pulled = [
            jax.vjp(lambda w, i=i: convolved(x[i], w), w)[1](cotangent[i])[0]
            for i in range(examples)
        ]
        return jnp.concatenate(pieces, axis=2), jnp.stack(pulled)

    ours, wanted = both(x, cotangent)
    if first:
        wanted = wanted.transpose(0, 3, 4, 2, 1)
    assert_close(ours[:, 0], wanted.reshape(ours[:, 0].shape), 1e-5)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 8, 4), (3, 4, 2), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
        ((1, 8, 8, 4), (3, 3, 2, 2), {"dimension_numbers": LAST, "feature_group_count": 2}),
        ((1, 8, 8, 4), (3, 3, 4, 2), {"dimension_numbers": LAST, "lhs_dilation": (2, 2)}),
    ],
    ids=["of sequences", "grouped", "transposed"],
)
def test_other_convolutions_do_not_go_by_row(shape, kernel, options):
    def convolved(x, w):
        rank = x.ndim - 2
        return lax.conv_general_dilated(x, w, (1,) * rank, ((0, 0),) * rank, **options)

    (equation,) = jax.make_jaxpr(convolved)(jnp.zeros(shape), jnp.zeros(kernel)).eqns
    assert not convolution.goes_by_row(equation)


DEPTHWISE = {  # image of 3 channels, kernel with 2 filters for each, options
    "of images": ((2, 7, 6, 3), (3, 2, 1, 6), {"dimension_numbers": LAST}),
    "strided": ((1, 7, 8, 3), (3, 3, 1, 6), {"dimension_numbers": LAST, "strides": (2, 1)}),
    "transposed": ((1, 4, 4, 3), (3, 3, 1, 6), {"dimension_numbers": LAST, "lhs_dilation": (2, 2)}),
    "channels first": ((2, 3, 7, 6), (6, 1, 2, 3), {"dimension_numbers": FIRST}),
    "of sequences": ((1, 9, 3), (4, 1, 6), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_gradients_by_entry_are_those_of_a_depthwise_filter(name):
    shape, kernel, options = DEPTHWISE[name]
    strides = options.get("strides", (1,) * (len(shape) - 2))
    more = {key: value for key, value in options.items() if key != "strides"}

    def convolved(x, w):
        padding = ((1, 2),) * len(strides)
        return lax.conv_general_dilated(x, w, strides, padding, feature_group_count=3, **more)

    x, w = numbers(2, *shape), numbers(*kernel)
    (equation,) = jax.make_jaxpr(convolved)(x[0], w).eqns
    assert convolution.is_depthwise(equation)
    cotangent = numbers(2, *equation.outvars[0].aval.shape)

    @jax.jit
    def both(x, cotangent):
        ours = convolution.gradients_by_entry(equation, x, cotangent)
        return ours, jax.vmap(lambda x, c: jax.vjp(lambda w: convolved(x, w), w)[1](c)[0])(
            x, cotangent
        )

    ours, wanted = both(x, cotangent)
    spec = equation.params["dimension_numbers"][1]
    wanted = channels_last(wanted, (spec[0], spec[1], *spec[2:]), lead=1)  # (2, 6, *kernel, 1)
    wanted = wanted.reshape(2, 3, 2, -1).swapaxes(2, 3)
    assert_close(ours, wanted, 1e-5)
