"""Convolutions as patches and a product."""

import jax
import numpy as np
from hypothesis import given, settings
from jax import lax

from cabs_jax.moments.convolution import channels_last, convolve
from tests.cabs_jax.moments.geometries import convolutions, numbers
from tests.cabs_jax.moments.oracle import assert_close


@given(convolutions(batch_groups=True))
@settings(max_examples=40, deadline=None)
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


def test_channels_last_behind_leading_axes():
    x = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    # (examples, then batch, channels, height, width)
    np.testing.assert_array_equal(
        channels_last(jax.numpy.asarray(x), (0, 1, 2, 3), lead=1), np.moveaxis(x, 2, -1)
    )
