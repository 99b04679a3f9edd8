"""Convolutions."""

import jax.numpy as jnp
from jax import lax

from tests.cabs_jax.moments.zoo.case import DIMENSIONS, add, case, convolution, squares


@case(held="b")
def convolution_2d(draw):
    def loss(p, x):
        h = jnp.tanh(add(convolution(x, p["w"]), p["b"]))
        pooled = lax.reduce_window(h, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "SAME")
        return squares(convolution(pooled, p["v"]))

    params = {"w": draw(3, 3, 2, 4), "b": draw(4), "v": draw(3, 2, 4, 3)}
    return loss, params, draw.batch(6, 5, 2)


@case()
def convolution_1d(draw):
    def loss(p, x):
        return squares(convolution(x, p["w"], 2, "VALID")) + squares(
            jnp.convolve(x[:, 0], p["kernel"], mode="same")
        )

    return loss, {"w": draw(4, 2, 3), "kernel": draw(3)}, draw.batch(9, 2)


@case()
def convolution_3d(draw):
    def loss(p, x):
        return squares(convolution(x, p["w"], (1, 2, 1)))

    return loss, {"w": draw(2, 3, 2, 2, 3)}, draw.batch(3, 4, 3, 2)


@case()
def grouped_and_dilated_convolution(draw):
    def loss(p, x):
        h = convolution(x, p["w"], (2, 1), feature_group_count=2)
        return squares(convolution(h, p["v"], padding=((1, 0), (-1, 3)), rhs_dilation=(1, 2)))

    return loss, {"w": draw(3, 3, 2, 6), "v": draw(2, 2, 6, 3)}, draw.batch(6, 5, 4)


@case()
def depthwise_separable_convolution(draw):
    def loss(p, x):
        h = jnp.tanh(convolution(x, p["depth"], feature_group_count=4))
        return squares(convolution(h, p["point"]))

    return loss, {"depth": draw(3, 3, 1, 8), "point": draw(1, 1, 8, 3)}, draw.batch(5, 4, 4)


@case()
def transposed_convolution(draw):
    def loss(p, x):
        h = lax.conv_transpose(x[None], p["w"], (2, 2), "SAME")[0]
        return squares(h)

    return loss, {"w": draw(3, 3, 2, 3)}, draw.batch(3, 4, 2)


@case()
def channels_first_convolution(draw):
    def loss(p, x):
        options = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}
        return squares(convolution(x, p["w"], 2, **options))

    return loss, {"w": draw(4, 2, 3, 2)}, draw.batch(2, 6, 5)


@case()
def frames_in_the_batch_of_a_convolution(draw):
    def loss(p, frames):
        return squares(
            lax.conv_general_dilated(
                frames, p["w"], (1, 1), "SAME", dimension_numbers=DIMENSIONS[2]
            )
        )

    return loss, {"w": draw(3, 3, 2, 3)}, draw.batch(3, 5, 4, 2)


@case(held="image")
def parameters_as_the_image_of_a_convolution(draw):
    def loss(p, kernel):
        return squares(convolution(p["image"], kernel))

    return loss, {"image": draw(6, 5, 2)}, draw.batch(3, 3, 2, 3)


@case(held="w")
def batch_grouped_convolution(draw):
    def loss(p, frames):
        options = {"dimension_numbers": DIMENSIONS[2], "batch_group_count": 2}
        return squares(lax.conv_general_dilated(frames, p["w"], (1, 1), "SAME", **options))

    return loss, {"w": draw(3, 3, 2, 4)}, draw.batch(4, 5, 4, 2)


@case()
def kernel_made_from_the_example(draw):
    def loss(p, x):
        kernel = jnp.tanh(jnp.mean(x, (0, 1)) @ p["w"]).reshape(2, 2, 2, 3)
        return squares(convolution(x, kernel))

    return loss, {"w": draw(2, 24)}, draw.batch(5, 4, 2)
