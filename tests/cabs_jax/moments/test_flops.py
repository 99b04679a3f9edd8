"""Operations counted from a jaxpr."""

import jax
import jax.numpy as jnp
import pytest

from cabs_jax.moments.flops import flops


def test_flops_count_every_turn_of_a_loop_and_no_dead_code():
    x = jnp.ones((4, 4))
    product = 2 * 4**3

    def chain(x):
        jnp.sin(x)
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0] + x

    assert flops(chain, x) == 5 * product + 16
    assert flops(jax.jit(jnp.sum), x) == 16


@pytest.mark.parametrize(
    ("padding", "dilation", "products"),
    [("VALID", 1, 3 * 3), ([(1, 1)], 1, 3 * 5 - 2), ([(1, 1)], 2, 13)],
)
def test_flops_of_convolutions_leave_out_padding_and_holes(padding, dilation, products):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), padding, lhs_dilation=(dilation,))

    x, w = jnp.ones((2, 3, 5)), jnp.ones((4, 3, 3))
    assert flops(convolve, x, w) == 2 * 2 * 4 * 3 * products
