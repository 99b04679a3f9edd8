"""What the moments cost for losses that people write, as multiples of the plain gradient's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cabs_jax import gradient_moments
from cabs_jax.moments import jaxprs
from cabs_jax.moments.flops import flops
from tests.cabs_jax.moments.zoo.case import convolution, squares


def plain(loss):
    return jax.value_and_grad(lambda p, batch: jnp.mean(jax.vmap(loss, (None, 0))(p, batch)))


EXAMPLES, WIDTH = 64, 32
ORDER = np.random.default_rng(0).permutation(WIDTH).astype(np.int32)
HEADS = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)


def largest(function, *args):
    """The number of entries of the largest array that a program makes on its way."""

    def of(jaxpr):
        sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
        inner = [of(each) for e in jaxpr.eqns for each in jaxprs.subjaxprs(e)]
        return max([*sizes, *inner], default=0)

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def permuted(p, x):
    return squares(jnp.tanh(x @ p["w"][:, ORDER]) @ jnp.take(p["v"], ORDER, axis=0))


def padded(p, x):
    return squares(jnp.tanh(x @ p["w"]) @ jnp.pad(p["v"], ((0, 0), (0, 8))))


def repeated(p, x):
    heads = jnp.tensordot(x, jnp.repeat(p["w"].reshape(WIDTH, 2, -1), 4, axis=1), 1)
    return squares(jnp.tensordot(heads, jnp.repeat(p["v"].reshape(2, 16, -1), 4, axis=0)))


def picked(p, x):
    w = p["w"].reshape(WIDTH, 2, -1)[:, HEADS]
    return squares(jnp.tensordot(x, w, 1).reshape(-1) @ jnp.tile(p["v"], (4, 1)))


def spectral(p, x):
    weights = lax.complex(p["w"], p["v"])
    return squares((lax.complex(x, jnp.flip(x)) @ weights).real)


# Multiples of the operations of the plain gradient: of the trace and of the diagonal. A product of
# complex numbers is counted once there, and is four of real ones here.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "trace", "diagonal"),
    [
        (permuted, 1.1, 1.5),
        (padded, 1.1, 1.5),
        (repeated, 1.0, 1.5),
        (picked, 1.0, 1.5),
        (spectral, 4.2, 5.5),
    ],
)
def test_weights_that_are_moved_about_cost_what_they_cost_themselves(loss, trace, diagonal):
    params = {"w": jnp.ones((WIDTH, WIDTH)), "v": jnp.ones((WIDTH, WIDTH))}
    batch = jnp.ones((EXAMPLES, WIDTH))
    once = flops(plain(loss), params, batch)
    for variance, price in (("trace", trace), ("diagonal", diagonal)):
        measure = gradient_moments(loss, variance=variance)
        assert flops(measure, params, batch) < price * once
        if variance == "trace":  # no gradient is held for every example
            assert largest(measure, params, batch) < EXAMPLES * WIDTH * WIDTH


def normalised_columns(p, x):
    return squares(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True) * jnp.exp(p["v"])))


@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
def test_no_gradient_is_written_out_to_be_pulled_back_to_what_a_weight_is_computed_from(variance):
    params = {"w": jnp.ones((WIDTH, WIDTH)), "v": jnp.ones((WIDTH, WIDTH))}
    batch = jnp.ones((EXAMPLES, WIDTH))
    measure = gradient_moments(normalised_columns, variance=variance)
    once = flops(plain(normalised_columns), params, batch)
    assert flops(measure, params, batch) < 3.2 * once  # products as large as the plain one's three
    assert largest(measure, params, batch) < EXAMPLES * WIDTH * WIDTH


def test_no_gradient_is_written_out_for_the_norm_of_what_an_example_picks():
    def loss(p, e):
        return squares(jnp.tanh(e["x"] @ p[e["expert"]]))

    params = jnp.ones((4, WIDTH, WIDTH))
    batch = {"x": jnp.ones((EXAMPLES, WIDTH)), "expert": jnp.zeros(EXAMPLES, jnp.int32)}
    once = flops(plain(loss), params, batch)
    assert flops(gradient_moments(loss), params, batch) < 1.1 * once


@pytest.mark.parametrize("words", [32, 128, 512])
def test_words_that_are_added_up_are_compared_without_what_is_in_their_rows(words):
    def loss(p, words):
        return squares(jnp.tanh(jnp.mean(p[words], 0)))

    params, batch = jnp.ones((2000, WIDTH)), jnp.zeros((EXAMPLES, words), jnp.int32)
    measure = gradient_moments(loss, platform="cpu")
    once, all_pairs = flops(plain(loss), params, batch), EXAMPLES * words**2 * WIDTH
    assert flops(measure, params, batch) - once < all_pairs / 2
    assert largest(measure, params, batch) <= max(EXAMPLES * words * WIDTH, EXAMPLES * 2000)


def test_words_of_a_table_with_weights_for_its_rows_are_added_up_by_sorting():
    weights = jnp.linspace(0.5, 1.0, 2000)[:, None]

    def loss(p, words):
        return squares(jnp.tanh(jnp.mean((weights * p)[words], 0)))

    params, batch = jnp.ones((2000, WIDTH)), jnp.zeros((EXAMPLES, 512), jnp.int32)
    all_pairs = EXAMPLES * 512**2 * WIDTH
    assert flops(gradient_moments(loss, platform="cpu"), params, batch) < all_pairs / 2


@jax.custom_vjp
def layer(w, x):
    return jnp.tanh(x @ w)


def layer_forward(w, x):
    y = layer(w, x)
    return y, (w, x, y)


def layer_backward(saved, cotangent):
    w, x, y = saved
    cotangent = cotangent * (1 - jnp.square(y))
    return x.T @ cotangent, cotangent @ w.T


layer.defvjp(layer_forward, layer_backward)


@pytest.mark.parametrize("variance", ["trace", "diagonal"])
def test_a_custom_derivative_rule_goes_forward_once(variance):
    def loss(w, x):
        return squares(layer(w, layer(w, x)))

    arguments = jnp.ones((32, 32)), jnp.ones((4, 64, 32))
    once = flops(plain(loss), *arguments)
    assert flops(gradient_moments(loss, variance=variance), *arguments) < 1.1 * once


def test_depthwise_convolutions_lay_out_no_patches():
    def loss(w, x):
        return squares(convolution(x, w, feature_group_count=8))

    arguments = jnp.ones((3, 3, 1, 8)), jnp.ones((4, 16, 16, 8))
    padded = 4 * 18 * 18 * 8
    for variance in ("trace", "diagonal"):
        assert largest(gradient_moments(loss, variance=variance), *arguments) <= padded


def mlp(p, x):
    for w, b in p:
        x = jnp.tanh(x @ w + b)
    return squares(x)


@pytest.mark.slow
def test_memory_of_a_perceptron_is_that_of_the_plain_gradient():
    def memory(function):
        params, batch = [(jnp.ones((256, 256)), jnp.ones(256))] * 2, jnp.ones((128, 256))
        compiled = jax.jit(function).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Squares of activations are added up as they are made, and not written to memory.
    assert memory(gradient_moments(mlp)) < 1.3 * memory(plain(mlp))
