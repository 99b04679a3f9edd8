"""Products and convolutions of every kind, for hypothesis."""

import math

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from jax.lax import ConvDimensionNumbers

small = st.integers(1, 3)


@st.composite
def products(draw):
    """`(dimension_numbers, lhs_shape, rhs_shape)` of a dot_general in any layout."""
    batch, contract, left, right = (draw(st.lists(small, max_size=2)) for _ in range(4))

    def laid_out(free):
        sizes = [*batch, *contract, *free]
        places = draw(st.permutations(range(len(sizes))))
        shape = [0] * len(sizes)
        for place, size in zip(places, sizes, strict=True):
            shape[place] = size
        return tuple(shape), places[: len(batch)], places[len(batch) :][: len(contract)]

    lhs_shape, lhs_batch, lhs_contract = laid_out(left)
    rhs_shape, rhs_batch, rhs_contract = laid_out(right)
    numbers = (
        (tuple(lhs_contract), tuple(rhs_contract)),
        (tuple(lhs_batch), tuple(rhs_batch)),
    )
    return numbers, lhs_shape, rhs_shape


@st.composite
def convolutions(draw, batch_groups=False):
    """`(lhs_shape, rhs_shape, options)` of a conv_general_dilated in any layout."""
    rank = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    groups = draw(st.integers(1, 3))
    channels, filters, batch = draw(small), draw(small), draw(st.integers(1, 2))
    by_batch = batch_groups and groups > 1 and draw(st.booleans())
    spatial, kernel, strides = each(1, 5), each(1, 3), each(1, 3)
    lhs_dilation, rhs_dilation = each(1, 2), each(1, 2)
    padding = tuple(zip(each(-1, 2), each(-1, 2), strict=True))
    for n, k, (low, high), a, b in zip(
        spatial, kernel, padding, lhs_dilation, rhs_dilation, strict=True
    ):
        assume((n - 1) * a + 1 + low + high >= (k - 1) * b + 1)
    lhs = (batch * (groups if by_batch else 1), channels * (1 if by_batch else groups), *spatial)
    rhs = (filters * groups, channels, *kernel)
    specs = [tuple(draw(st.permutations(range(rank + 2)))) for _ in range(3)]

    def laid_out(shape, spec):
        arranged = [0] * len(shape)
        for place, size in zip(spec, shape, strict=True):
            arranged[place] = size
        return tuple(arranged)

    options = {
        "window_strides": strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": ConvDimensionNumbers(*specs),
        "feature_group_count": 1 if by_batch else groups,
        "batch_group_count": groups if by_batch else 1,
    }
    return laid_out(lhs, specs[0]), laid_out(rhs, specs[1]), options


def numbers(*shape):
    """Distinct numbers around zero, the same for every call."""
    count = math.prod(shape)
    return np.sin(np.arange(1.0, count + 1)).astype(np.float32).reshape(shape)
