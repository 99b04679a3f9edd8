"""Biases, scales and norms."""

import jax.numpy as jnp
from jax import lax

from tests.cabs_jax.moments.zoo.case import add, case, convolution, normalised, squares


@case(held="scale shift gain slope temperature position", tolerance=2e-4)
def elementwise(draw):
    def loss(p, x):
        h = jnp.broadcast_to(p["scale"], x.shape) * x - jnp.broadcast_to(p["shift"], x.shape)
        h = jnp.where(h > 0, h, p["slope"] * h) + p["position"]
        return squares(p["gain"] * h[0] / jnp.exp(p["temperature"])) + jnp.sum(h)

    params = {name: draw() for name in ("gain", "slope", "temperature")}
    params |= {"scale": draw(5), "shift": draw(5), "position": draw(6, 5)}
    return loss, params, draw.batch(6, 5)


@case(held="*bias *scale")
def layer_and_rms_norm(draw):
    def loss(p, x):
        h = add(
            jnp.broadcast_to(p["layer"]["scale"], x.shape) * normalised(x, -1), p["layer"]["bias"]
        )
        h = h * lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6)
        return squares((h * jnp.broadcast_to(p["rms"]["scale"], h.shape)) @ p["w"])

    params = {"layer": {"scale": draw(5), "bias": draw(5)}, "rms": {"scale": draw(5)}}
    return loss, params | {"w": draw(5, 3)}, draw.batch(6, 5)


@case(held="scale bias")
def group_norm(draw):
    def loss(p, x):
        h = convolution(x, p["w"])
        h = normalised(h.reshape(4, 3, 2, 2), (0, 1, 3)).reshape(4, 3, 4)
        return squares(add(h * jnp.broadcast_to(p["scale"], h.shape), p["bias"]))

    params = {"w": draw(3, 3, 2, 4), "scale": draw(4), "bias": draw(4)}
    return loss, params, draw.batch(4, 3, 2)


@case(held="token")
def class_token(draw):
    def loss(p, x):
        rows = jnp.concatenate([p["token"][None], x]) @ p["w"]
        return squares(jnp.max(rows, 0) @ p["v"])

    return loss, {"token": draw(5), "w": draw(5, 7), "v": draw(7, 2)}, draw.batch(6, 5)
