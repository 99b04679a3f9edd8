"""One parameter in several places."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.cabs_jax.moments.zoo.case import add, case, convolution, squares


@case()
def embedding_as_output_head(draw):
    def loss(p, tokens):
        logits = jnp.tanh(p["table"][tokens]) @ p["table"].T
        return -jnp.sum(jax.nn.log_softmax(logits)[:-1] * jax.nn.one_hot(tokens[1:], 9))

    return loss, {"table": draw(9, 5)}, draw.tokens(6)


@case(held="b")
def siamese(draw):
    def loss(p, e):
        x, y = (jnp.tanh(add(e[name] @ p["w"], p["b"])) for name in ("x", "y"))
        return jnp.sum(x[0] * y[1]) + jnp.sum(x @ y.T)

    return loss, {"w": draw(5, 7), "b": draw(7)}, {"x": draw.batch(2, 5), "y": draw.batch(3, 5)}


@case(held="b")
def cell_applied_twice(draw):
    def loss(p, x):
        for _ in range(2):
            x = jnp.tanh(x @ p["w"] + p["b"])
        return squares(x + 1)

    return loss, {"w": draw(5, 5), "b": draw(5)}, draw.batch(5)


@case()
def autoencoder_with_transposed_weights(draw):
    def loss(p, x):
        return squares(jnp.tanh(x @ p["w"]) @ p["w"].T - x)

    return loss, {"w": draw(5, 7)}, draw.batch(3, 5)


@case()
def convolution_applied_twice(draw):
    def loss(p, x):
        return squares(convolution(jnp.tanh(convolution(x, p["w"])), p["w"]))

    return loss, {"w": draw(3, 2, 3, 3, scale=0.5)}, draw.batch(5, 4, 3)


@case()
def pointwise_convolution_tied_to_a_dense_layer(draw):
    def loss(p, x):
        h = jnp.tanh(convolution(x, p["w"][None, None]))
        return squares(h.reshape(-1, 4) @ p["w"])

    return loss, {"w": draw(4, 4)}, draw.batch(3, 2, 4)


@case()
def overlapping_slices(draw):
    def loss(p, x):
        h = jnp.tanh(x[:4] @ p["w"][:4]) + jnp.tanh(x[2:] @ p["w"][2:])
        return squares(h @ p["v"][:, :2]) + squares(h @ p["v"][:, 1:])

    return loss, {"w": draw(6, 3), "v": draw(3, 3)}, draw.batch(6)


@case()
def separate_slices(draw):
    def loss(p, x):
        first, second, third = jnp.split(p["w"], [2, 5], axis=1)
        h = jnp.concatenate([jnp.tanh(x @ first), jnp.sin(x @ second), x @ third])
        return squares(h @ p["v"][:6]) + squares(x @ p["v"][6:])

    return loss, {"w": draw(5, 6), "v": draw(11, 2)}, draw.batch(5)


@case(tolerance=2e-3)
def used_in_two_precisions(draw):
    def loss(p, x):
        half = x.astype(jnp.float16) @ p["w"].astype(jnp.float16)
        return squares(half.astype(x.dtype) @ p["v"]) + squares(x @ p["w"])

    # Quarters, of which float16 products are exact.
    params = {"w": np.round(4 * draw(5, 3)) / 4, "v": draw(3, 2)}
    return loss, params, np.round(4 * draw.batch(5)) / 4


@case(held="w u")
def two_parameters_in_one_equation(draw):
    def loss(p, x):
        return squares(jnp.where(x > 0, p["w"], p["u"])) + squares(x @ p["v"])

    return loss, {"w": draw(5), "u": draw(5), "v": draw(5, 2)}, draw.batch(5)
