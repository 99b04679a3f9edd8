"""Unusual parameters, batches and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from tests.cabs_jax.moments.zoo.case import EXAMPLES, add, case, squares


@case(unused="unused frozen step")
def odd_leaves(draw):
    def loss(p, e):
        h = e["x"] @ p["w"] + e["x"] @ lax.stop_gradient(p["frozen"])
        return squares(h * p["step"].astype(h.dtype)) if e["nothing"] is None else 0.0

    params = {"w": draw(5, 3), "frozen": draw(5, 3), "unused": draw(2), "none": None}
    params |= {"step": np.int32(2)}
    return loss, params, {"x": draw.batch(5), "nothing": None}


@case()
def dropout_with_keys_in_the_batch(draw):
    def loss(p, e):
        bits = jax.random.bits(e["key"], (7,), jnp.uint32)
        h = jnp.where(bits % 2 == 0, jnp.tanh(e["x"] @ p["w"]), 0)
        return squares(h @ p["v"])

    keys = jax.random.split(jax.random.key(0), EXAMPLES)
    return loss, {"w": draw(5, 7), "v": draw(7, 2)}, {"x": draw.batch(5), "key": keys}


@case(held="b", tolerance=3e-2)
def bfloat16_compute(draw):
    def loss(p, x):
        w, b = (p[name].astype(jnp.bfloat16) for name in ("w", "b"))
        h = add(x.astype(jnp.bfloat16) @ w, b)
        return squares((h @ p["v"].astype(jnp.bfloat16)).astype(x.dtype))

    params = {"w": draw(5, 7), "b": draw(7), "v": draw(7, 2)}
    return loss, params, draw.batch(9, 5)


@case(held="b")
def cross_entropy_of_a_perceptron(draw):
    def loss(p, e):
        logits = jax.nn.relu(e["x"] @ p["w"] + p["b"]) @ p["v"]
        return jax.nn.logsumexp(logits) - logits[e["label"]]

    params = {"w": draw(5, 8), "b": draw(8), "v": draw(8, 9)}
    return loss, params, {"x": draw.batch(5), "label": draw.tokens()}


@case()
def a_single_array(draw):
    return lambda w, x: squares(w @ x), draw(3, 5), draw.batch(5)


@case()
def a_list_of_a_tuple(draw):
    def loss(p, e):
        (w, v), x = p[0], e[0]
        return squares(jnp.tanh(x @ w) @ v)

    return loss, [(draw(5, 3), draw(3, 2))], (draw.batch(5),)


@case()
def a_ravelled_tree(draw):
    flat, unravel = ravel_pytree({"w": draw(5, 6), "v": draw(6, 3)})

    def loss(p, x):
        tree = unravel(p)
        return squares(jnp.tanh(x @ tree["w"]) @ tree["v"])

    return loss, np.asarray(flat), draw.batch(4, 5)


@case()
def tokens_of_eight_bits_in_a_longer_table(draw):
    def loss(p, token):
        return squares(p["table"][token] @ p["w"])

    tokens = draw.tokens(4, high=256).astype(np.uint8)
    return loss, {"table": draw(300, 5), "w": draw(5, 3)}, tokens


@case()
def pixels_of_eight_bits(draw):
    def loss(p, image):
        return squares(image.astype(p.dtype) / 255 @ p)

    return loss, draw(5, 3), draw.tokens(5, high=256).astype(np.uint8)


@case(held="b")
def a_jitted_sum_that_also_returns_its_terms(draw):
    @jax.jit
    def terms(p, x):
        data, penalty = squares(x @ p["w"] + p["b"]), 0.1 * jnp.sum(jnp.square(p["w"]))
        return data + penalty, data

    def loss(p, x):
        total, data = terms(p, x)
        return total + 0.5 * data

    return loss, {"w": draw(5, 3), "b": draw(3)}, draw.batch(5)
