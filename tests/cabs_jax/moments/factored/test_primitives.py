"""Each rule makes a weight's gradient from its factors, whatever the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import outer_products
from cabs_jax.moments.factored.primitives import RULES, find_rule
from tests.cabs_jax.moments.geometries import convolutions, numbers, products
from tests.cabs_jax.moments.oracle import assert_close

EXAMPLES = 2


def equation_of(function, *operands):
    (equation,) = [e for e in jax.make_jaxpr(function)(*operands).eqns if jaxprs.name(e) in RULES]
    return equation


def check(function, operand, weight, x):
    """Compares the gradient assembled from factors with that of the function itself."""

    def applied(w, x):
        return function(w, x) if operand == 0 else function(x, w)

    equation = equation_of(function, *((weight, x[0]) if operand == 0 else (x[0], weight)))
    rule = find_rule(equation, operand)
    cotangent = numbers(EXAMPLES, *equation.outvars[0].aval.shape)

    @jax.jit
    def both(x, cotangent):
        factors = rule.factors(x, cotangent)
        groups, positions, p, q = rule.sizes()
        assert factors[1].shape == (EXAMPLES, groups, positions, q)
        left = (EXAMPLES, positions) if rule.one_hot else (EXAMPLES, groups, positions, p)
        assert factors[0].shape == left
        assembled = rule.assemble(outer_products.gradients(factors, p), weight.shape)
        pulled = [
            jax.vjp(lambda w, i=i: applied(w, x[i]), weight)[1](cotangent[i])[0]
            for i in range(EXAMPLES)
        ]
        return assembled, jnp.stack(pulled)

    assembled, pulled = both(x, cotangent)
    assert_close(assembled, pulled, 1e-5)


@pytest.mark.slow
@given(products(), st.booleans())
@settings(max_examples=12, deadline=None)
def test_dot_general_in_every_layout(product, weight_first):
    dimension_numbers, lhs, rhs = product

    def function(a, b):
        return lax.dot_general(a, b, dimension_numbers)

    weight, x = (lhs, rhs) if weight_first else (rhs, lhs)
    check(function, 0 if weight_first else 1, numbers(*weight), numbers(EXAMPLES, *x))


@pytest.mark.slow  # compiles many
@given(convolutions())
@settings(max_examples=12, deadline=None)
def test_convolution_of_every_kind(geometry):
    lhs, rhs, options = geometry

    def function(x, w):
        return lax.conv_general_dilated(x, w, **options)

    check(function, 1, numbers(*rhs), numbers(EXAMPLES, *lhs))


@pytest.mark.parametrize("mode", ["clip", "fill"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_gather_of_slices_of_a_table(mode, axis, shape):
    table = numbers(4, 5, 3)
    indices = np.random.default_rng(0).integers(-9, 9, (EXAMPLES, *shape, 1)).astype(np.int32)

    def function(table, indices):
        start = tuple(range(3))
        offsets = tuple(a if a < axis else a - 1 + len(shape) for a in start if a != axis)
        return lax.gather(
            table,
            indices,
            lax.GatherDimensionNumbers(offsets, (axis,), (axis,)),
            tuple(1 if a == axis else n for a, n in enumerate(table.shape)),
            mode=mode,
            fill_value=0,
        )

    check(function, 0, table, indices)


@pytest.mark.parametrize("mode", ["clip", "fill"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 2), (3, 2, 3), (4, 5, 3)])
def test_gather_of_windows_by_several_indices(mode, sizes):
    table = numbers(4, 5, 3)
    indices = np.random.default_rng(0).integers(-2, 5, (EXAMPLES, 6, 2)).astype(np.int32)

    def function(table, indices):
        windows = lax.GatherDimensionNumbers((0, 2, 3), (), (2, 0))
        return lax.gather(table, indices, windows, sizes, mode=mode, fill_value=0)

    check(function, 0, table, indices)


def test_positions_of_a_single_window_are_apart():
    table, start = jnp.ones((4, 5)), jnp.zeros(2, jnp.int32)
    assert rule_of(lambda w, i: lax.dynamic_slice(w, (i[0], 0), (2, 5)), 0, table, start).apart
    assert not rule_of(lambda w, i: w[i], 0, table, start).apart


def rule_of(function, operand, *operands):
    return find_rule(equation_of(function, *operands), operand)


def test_what_no_rule_covers_has_none():
    kernel = jnp.ones((2, 2, 3, 4))
    image = jnp.ones((2, 5, 5, 3))

    def grouped(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layout, batch_group_count=2
        )

    assert rule_of(grouped, 1, image, kernel) is None
    assert rule_of(grouped, 0, image, kernel) is None
    start = jnp.zeros(2, jnp.int32)
    assert rule_of(lambda w, i: lax.dynamic_slice(i, w, (1,)), 1, start[:1], start) is None
    assert rule_of(jnp.dot, 0, jnp.ones((2, 3), jnp.complex64), jnp.ones(3, jnp.complex64)) is None
    addition = jax.make_jaxpr(lambda a, b: a + b)(1.0, 2.0).eqns[0]
    assert find_rule(addition, 0) is None
