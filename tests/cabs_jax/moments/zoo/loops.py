"""Scans, loops and branches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.cabs_jax.moments.zoo.case import add, case, convolution, squares


def layer(p, x):
    return x + jnp.tanh(add(x @ p["w"], p["b"]))


@case(held="b")
def scan_over_layers(draw):
    def loss(p, x):
        def body(h, q):
            h = jax.checkpoint(layer)(q, h)
            return h, jnp.sum(h)

        h, sums = lax.scan(body, x, p)
        return squares(h) + jnp.sum(jnp.sin(sums))

    return loss, {"w": draw(3, 4, 4), "b": draw(3, 4)}, draw.batch(2, 4)


def recurrent(p, start, xs, **options):
    def cell(h, x):
        h = jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"])
        return h, h

    return lax.scan(cell, start, xs, **options)


@case(held="b")
def scan_over_time(draw):
    def loss(p, xs):
        return squares(recurrent(p, jnp.zeros(4, xs.dtype), xs)[0])

    return loss, {"w": draw(4, 4), "u": draw(3, 4), "b": draw(4)}, draw.batch(6, 3)


@case(held="b start")
def scan_reversed_unrolled_started_by_a_parameter(draw):
    def loss(p, xs):
        _, states = recurrent(p, p["start"], xs, reverse=True, unroll=2)
        return squares(states @ p["head"])

    params = {"w": draw(4, 4), "u": draw(3, 4), "b": draw(4), "start": draw(4), "head": draw(4, 2)}
    return loss, params, draw.batch(5, 3)


@case(held="w u b")
def scan_over_time_inside_scan_over_layers(draw):
    def loss(p, xs):
        def deeper(xs, q):
            return recurrent(q, jnp.zeros(3, xs.dtype), xs)[1], None

        return squares(lax.scan(deeper, xs, {k: p[k] for k in "wub"})[0] @ p["head"])

    params = {"w": draw(2, 3, 3), "u": draw(2, 3, 3), "b": draw(2, 3), "head": draw(3, 2)}
    return loss, params, draw.batch(4, 3)


@case(held="b")
def one_layer_for_every_depth_and_time(draw):
    def loss(p, xs):
        def deeper(xs, _):
            return lax.map(lambda x: layer(p, x[None])[0], xs), None

        return squares(lax.scan(deeper, xs, None, length=3)[0]) + squares(layer(p, xs))

    return loss, {"w": draw(3, 3), "b": draw(3)}, draw.batch(4, 3)


@case(held="w v")
def scan_hands_out_parameters(draw):
    def loss(p, x):
        def body(h, w):
            return jnp.tanh(h @ w), (w, p["v"])

        h, (ws, vs) = lax.scan(body, x, p["w"])
        return squares(h) + squares(jnp.einsum("i,tij->tj", x, ws)) + jnp.sum(vs) * x[0]

    return loss, {"w": draw(2, 4, 4), "v": draw(3)}, draw.batch(4)


@case(held="decay")
def associative_scan(draw):
    def loss(p, x):
        def combine(first, second):
            return first[0] * second[0], first[1] * second[0] + second[1]

        h = x @ p["w"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), h.shape)
        return squares(lax.associative_scan(combine, (decay, h))[1])

    return loss, {"decay": draw(3), "w": draw(4, 3)}, draw.batch(5, 4)


@case()
def fori_loop(draw):
    def loss(p, x):
        return squares(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x))

    return loss, {"w": draw(3, 4, 4)}, draw.batch(4)


@case(held="again beyond")
def layers_taken_by_the_index_of_a_loop(draw):
    def loss(p, x):
        scaled = 0.5 * p["scaled"]

        def layer(i, h):
            h = jnp.tanh(h @ p["later"][i] + x @ scaled[i])
            return jnp.tanh(h @ p["again"][i] @ p["again"][i] + h @ p["beyond"][i])

        return squares(lax.fori_loop(1, 4, layer, x))

    params = {"later": draw(4, 4, 4), "scaled": draw(6, 4, 4), "again": draw(4, 4, 4)}
    return loss, params | {"beyond": draw(3, 4, 4)}, draw.batch(4)


@case(held="w v")
def cond_on_the_example(draw):
    def loss(p, x):
        h = lax.cond(x[0] > 0, lambda: jnp.tanh(x @ p["w"]), lambda: jnp.sin(x @ p["w"] * 2))
        branches = [lambda h, v=p["v"], k=k: jnp.tanh(k * h @ v) for k in (1.0, 2.0)]
        return squares(h) + squares(lax.switch(jnp.int32(x[1] > 0), branches, h))

    return loss, {"w": draw(4, 3), "v": draw(3, 2)}, draw.batch(4)


@case(held="w s")
def cond_on_a_parameter(draw):
    def loss(p, x):
        return squares(lax.cond(p["s"] > 0, lambda: x @ p["w"], lambda: x @ p["w"] * p["s"]))

    return loss, {"w": draw(4, 3), "s": np.float32(-0.5)}, draw.batch(4)


@case(held="w")
def convolution_inside_cond_and_scan(draw):
    def loss(p, x):
        h = lax.cond(
            jnp.sum(x) > 0,
            lambda: convolution(x, p["w"], 2),
            lambda: jax.checkpoint(convolution)(x, p["w"])[::2, ::2],
        )
        return squares(lax.fori_loop(0, 2, lambda i, h: jnp.tanh(convolution(h, p["v"][i])), h))

    return loss, {"w": draw(3, 3, 2, 3), "v": draw(2, 2, 2, 3, 3)}, draw.batch(5, 4, 2)


@case(held="w", unused="w")
def while_loop_behind_stop_gradient(draw):
    def loss(p, x):
        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ p["w"])

        _, h = lax.while_loop(lambda state: state[0] < 3, body, (0, x))
        return squares(lax.stop_gradient(h) @ p["v"])

    return loss, {"w": draw(4, 4), "v": draw(4, 2)}, draw.batch(4)


@jax.custom_vjp
def fixed_point(w, x):
    """z = tanh(z w / 8 + x), with the implicit derivative."""
    return lax.while_loop(
        lambda state: jnp.max(jnp.abs(state[0] - state[1])) > 1e-7,
        lambda state: (state[1], jnp.tanh(state[1] @ w / 8 + x)),
        (x, jnp.tanh(x)),
    )[1]


def _fixed_point_backward(saved, cotangent):
    w, x, z = saved
    _, pull = jax.vjp(lambda z, w, x: jnp.tanh(z @ w / 8 + x), z, w, x)
    adjoint = lax.fori_loop(0, 30, lambda _, u: cotangent + pull(u)[0], cotangent)
    return pull(adjoint)[1:]


def _fixed_point_forward(w, x):
    z = fixed_point(w, x)
    return z, (w, x, z)


fixed_point.defvjp(_fixed_point_forward, _fixed_point_backward)


@case(held="w")
def implicit_layer(draw):
    def loss(p, x):
        return squares(fixed_point(p["w"], x @ p["u"]))

    return loss, {"w": draw(4, 4), "u": draw(3, 4)}, draw.batch(3)
