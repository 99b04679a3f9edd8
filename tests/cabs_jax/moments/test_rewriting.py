"""No convolution of two batched operands is left, wherever it stood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.rewriting import CONVOLUTION, without_batched_convolutions
from tests.cabs_jax.moments.oracle import assert_close
from tests.cabs_jax.moments.zoo.case import convolution

EXAMPLES = 3
W = np.sin(np.arange(36.0)).astype(np.float32).reshape(3, 3, 2, 2)
X = np.cos(np.arange(EXAMPLES * 40.0)).astype(np.float32).reshape(EXAMPLES, 5, 4, 2)


@jax.custom_vjp
def by_rule(x, w):
    return convolution(x, w)


by_rule.defvjp(
    lambda x, w: (convolution(x, w), (x, w)),
    lambda saved, g: tuple(2 * d for d in jax.vjp(convolution, *saved)[1](g)),
)


@jax.custom_jvp
def by_tangents(x, w):
    return convolution(x, w)


@by_tangents.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return by_tangents(x, w), convolution(dx, w) + 2 * convolution(x, dw)


def in_while(x, w):
    """Convolves, in the forward pass of a loop that is not differentiated, with the example."""
    kernel = lax.stop_gradient(x[:3, :3, :, None] * jnp.ones((1, 1, 1, 2), x.dtype))
    looped = lax.while_loop(
        lambda state: state[0] < 2,
        lambda state: (state[0] + 1, jnp.tanh(convolution(state[1], kernel))),
        (0, lax.stop_gradient(x)),
    )
    return looped[1] * convolution(x, w)


PLACES = {
    "nothing": convolution,
    "jit": jax.jit(convolution),
    "checkpoint": jax.checkpoint(convolution),
    "custom_vjp": by_rule,
    "custom_jvp": by_tangents,
    "cond": lambda x, w: lax.cond(
        jnp.sum(x) > 0, convolution, lambda x, w: x * w[0, 0, 0, 0], x, w
    ),
    "scan": lambda x, w: lax.scan(
        lambda h, k: (jnp.tanh(convolution(h, k * w)), None), x, jnp.arange(1, 3, dtype=w.dtype)
    )[0],
    "while": in_while,
    "nested": lambda x, w: lax.map(
        lambda k: lax.cond(k > 1, jax.jit(jax.checkpoint(convolution)), lambda x, w: x, k * x, w),
        jnp.arange(3, dtype=x.dtype),
    ),
}


def convolutions(jaxpr):
    for equation in jaxpr.eqns:
        if jaxprs.name(equation) == CONVOLUTION:
            yield equation
        for inner in jaxprs.subjaxprs(equation):
            yield from convolutions(inner)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_the_same_without_a_grouped_convolution(place):
    gradient = jax.value_and_grad(lambda w, x: jnp.sum(jnp.square(PLACES[place](x, w))))
    bare = jax.vmap(gradient, (None, 0))
    safe = jax.vmap(without_batched_convolutions(gradient), (None, 0))

    def grouped(function):
        found = convolutions(jax.make_jaxpr(function)(W, X).jaxpr)
        return [e for e in found if e.params["feature_group_count"] > 1]

    assert grouped(bare)
    assert not grouped(safe)
    assert_close(*jax.jit(lambda w, x: (safe(w, x), bare(w, x)))(W, X), 1e-5)


def test_functions_without_convolutions_are_left_alone():
    def function(w, x):
        return jnp.tanh(x @ w)

    w, x = jnp.ones((3, 2)), jnp.ones(3)
    rewritten = jax.make_jaxpr(without_batched_convolutions(function))(w, x)
    assert [jaxprs.name(e) for e in rewritten.eqns] == ["dot_general", "tanh"]


def test_what_cannot_be_rewritten_is_refused_by_name():
    def function(w, x):
        def operator(h):
            return 9 * h + convolution(h, w * jnp.sum(x))

        return lax.custom_linear_solve(operator, x, lambda f, b: b, symmetric=True)

    with pytest.raises(NotImplementedError, match="inside 'custom_linear_solve'"):
        jax.make_jaxpr(without_batched_convolutions(function))(W, X[0])
