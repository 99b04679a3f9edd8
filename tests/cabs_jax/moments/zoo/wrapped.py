"""Functions wrapped in jit, vmap, checkpoint and derivative rules."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.cabs_jax.moments.zoo.case import add, case, squares


@case(held="b")
def nested_jit(draw):
    @jax.jit
    def layer(p, x):
        return jax.jit(lambda w: x @ w)(p["w"]) + p["b"]

    def loss(p, x):
        return squares(layer(p, jnp.tanh(layer(p, x))))

    return loss, {"w": draw(5, 5), "b": draw(5)}, draw.batch(5)


@jax.custom_jvp
def clipped(x, w):
    return jnp.clip(x @ w, -1, 1)


@clipped.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return clipped(x, w), dx @ w + x @ dw


@case(held="w")
def custom_jvp(draw):
    def loss(p, x):
        return squares(clipped(x, p["w"]) @ p["v"]) + jnp.sum(jax.nn.relu(x @ p["u"]))

    return loss, {"w": draw(5, 3), "v": draw(3, 2), "u": draw(5, 2)}, draw.batch(5)


@jax.custom_vjp
def doubled(w, x):
    return x @ w


doubled.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda saved, g: (2 * jnp.outer(saved[1], g), g @ saved[0].T),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reversed_gradient(x, factor):
    return x


reversed_gradient.defvjp(lambda x, factor: (x, None), lambda factor, saved, g: (-factor * g,))


@case(held="w v")
def custom_vjp(draw):
    def loss(p, x):
        h = jnp.sin(doubled(p["w"], x))
        return squares(reversed_gradient(h, 0.3) @ p["u"]) + squares(doubled(p["v"], x[:3]))

    return loss, {"w": draw(5, 6), "u": draw(6, 7), "v": draw(3, 2)}, draw.batch(5)


@case()
def custom_vjp_of_a_parameter(draw):
    def loss(p, x):
        return squares(x @ reversed_gradient(p["w"], 2.0))

    return loss, {"w": draw(5, 3)}, draw.batch(5)


@case(held="b")
def checkpoint(draw):
    @jax.checkpoint
    def block(p, x):
        return x + jnp.tanh(add(x @ p["w"], p["b"])) @ p["v"]

    def loss(p, x):
        return squares(block(p, x))

    return loss, {"w": draw(4, 6), "b": draw(6), "v": draw(6, 4)}, draw.batch(3, 4)


@case()
def checkpoint_of_everything_by_name(draw):
    def loss(p, x):
        hidden = checkpoint_name(jnp.tanh(x @ p["w"]), "hidden")
        return squares(jnp.sin(hidden) @ p["v"])

    policy = jax.checkpoint_policies.save_only_these_names("hidden")
    params = {"w": draw(4, 6), "v": draw(6, 4)}
    return jax.checkpoint(loss, policy=policy), params, draw.batch(3, 4)


@case(held="b")
def vmap_over_positions(draw):
    def loss(p, x):
        return jnp.sum(jax.vmap(lambda row: squares(row @ p["w"] + p["b"]))(x))

    return loss, {"w": draw(5, 7), "b": draw(7)}, draw.batch(6, 5)


@case(held="b")
def vmap_over_an_ensemble(draw):
    def loss(p, x):
        members = jax.vmap(lambda q: jnp.tanh(x @ q["w"] + q["b"]), axis_name="members")
        centred = jax.vmap(lambda h: h - lax.pmean(h, "m"), axis_name="m")(members(p))
        return squares(centred)

    return loss, {"w": draw(3, 5, 7), "b": draw(3, 7)}, draw.batch(5)
