"""Weights that are entries of parameters, moved, scaled, masked or put together."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.cabs_jax.moments.zoo.case import case, convolution, squares

CHECKERBOARD = np.indices((5, 5)).sum(0) % 2


@case()
def scaled_weights(draw):
    def loss(p, x):
        h = jnp.tanh(x @ (0.1 * p["w"])) @ (p["v"] / jnp.sqrt(jnp.float32(4)).astype(x.dtype))
        return squares(h) + squares(jnp.tile(x, (3, 1)) @ (1 - p["u"] * 2))

    return loss, {"w": draw(5, 4), "v": draw(4, 3), "u": draw(5, 2)}, draw.batch(5)


@case()
def masked_weights(draw):
    def loss(p, x):
        mask = CHECKERBOARD.astype(x.dtype)
        h = squares(x[0] @ (p["w"] * mask)) + squares(x @ jnp.where(mask > 0, p["v"], 0.5))
        return h + squares(jnp.tril(p["u"]) @ x[0])

    return loss, {name: draw(5, 5) for name in ("w", "v", "u")}, draw.batch(3, 5)


@case()
def masked_convolution(draw):
    def loss(p, x):
        mask = np.zeros((3, 3, 1, 1), np.float32)
        mask[:2] = 0.5
        weights = p["w"] * jnp.broadcast_to(mask, p["w"].shape).astype(x.dtype)
        return squares(convolution(x, weights))

    return loss, {"w": draw(3, 3, 2, 4)}, draw.batch(4, 5, 2)


@case()
def table_with_a_padding_row(draw):
    def loss(p, e):
        rows = jnp.arange(9)[:, None] > 0
        table = p["table"] * jnp.broadcast_to(rows, (9, 5)).astype(p["table"].dtype)
        other = jnp.concatenate([jnp.zeros((1, 5), p["other"].dtype), p["other"]])
        return squares(table[e["tokens"]]) + squares(other[e["token"]])

    batch = {"tokens": draw.tokens(6, high=4), "token": draw.tokens()}
    return loss, {"table": draw(9, 5), "other": draw(8, 5)}, batch


@case()
def merged_queries_keys_and_values(draw):
    def loss(p, x):
        merged = jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
        q, k, v = jnp.split(x @ merged, 3, axis=1)
        return squares(jax.nn.softmax(q @ k.T) @ v)

    return loss, {name: draw(4, 3) for name in "qkv"}, draw.batch(5, 4)


@case()
def stacked_weights(draw):
    def loss(p, x):
        stacked = jnp.stack([p["a"], 2 * p["b"], p["c"][::-1]])
        return squares(jnp.einsum("i,kij->kj", x, stacked)) + squares(
            jnp.block([[p["d"][:2], p["d"][2:]]]) @ jnp.concatenate([x, x[:1]])
        )

    return loss, {"a": draw(5, 3), "b": draw(5, 3), "c": draw(5, 3), "d": draw(4, 3)}, draw.batch(5)


@case()
def padded_weights(draw):
    def loss(p, x):
        padded = jnp.pad(p["w"], ((0, 0), (1, 2)), constant_values=0.3)
        placed = lax.dynamic_update_slice(jnp.ones((5, 6), x.dtype), p["v"], (0, 2))
        zeros_around = jnp.pad(p["u"], ((0, 1), (2, 0)))
        h = jnp.tanh(x @ padded @ zeros_around)
        return squares(h) + squares(jnp.tanh(x) @ placed)

    return loss, {"w": draw(5, 3), "v": draw(5, 3), "u": draw(5, 3)}, draw.batch(5)


@case()
def flipped_and_rolled_weights(draw):
    def loss(p, x):
        h = x @ p["w"][:, ::-1] + jnp.sin(x) @ jnp.roll(p["v"], 2, axis=0)
        return squares(h @ lax.slice_in_dim(p["u"], 0, 6, 2))  # u[::2] is a gather on jax 0.9

    return loss, {"w": draw(5, 3), "v": draw(5, 3), "u": draw(6, 4)}, draw.batch(5)


@case()
def sums_of_weights(draw):
    def loss(p, x):
        mask = CHECKERBOARD.astype(x.dtype)
        h = jnp.tanh(x @ (p["a"] + p["b"])) @ (p["c"] - 2 * p["d"].T) + x @ (p["e"] + mask * p["f"])
        three = p["g"] - (p["h"] + p["i"] / 2)
        return squares(h) + squares(jnp.stack([x, 2 * x, jnp.sin(x)]) @ three)

    return loss, {name: draw(5, 5, scale=0.5) for name in "abcdefghi"}, draw.batch(5)


@case(unused="frozen")
def merged_low_rank_updates(draw):
    def loss(p, x):
        first = lax.stop_gradient(p["frozen"]) + 0.5 * (p["a"] @ p["b"])
        second = (p["w"] - (p["d"].T @ p["c"].T).T / 2).T
        third = p["u"] + p["e"] @ (p["f"] @ p["g"])
        return squares(jnp.tanh(x @ first)) + squares(second @ x) + squares(jnp.sin(x) @ third)

    shapes = {
        "frozen": (12, 12),
        "a": (12, 2),
        "b": (2, 12),
        "w": (12, 12),
        "c": (12, 2),
        "d": (2, 12),
    }
    shapes |= {"u": (12, 12), "e": (12, 2), "f": (2, 3), "g": (3, 12)}
    return loss, {name: draw(*shape, scale=0.5) for name, shape in shapes.items()}, draw.batch(12)


@case()
def merged_updates_in_a_checkpointed_scan(draw):
    def loss(p, x):
        @jax.checkpoint
        def layer(h, p):
            return jnp.tanh(h @ (p["w"] + 0.5 * jax.jit(jnp.matmul)(p["a"], p["b"]))), None

        return squares(lax.scan(layer, x, p)[0])

    return loss, {"w": draw(3, 8, 8), "a": draw(3, 8, 1), "b": draw(3, 1, 8)}, draw.batch(8)


@case()
def sum_with_its_own_transpose(draw):
    return lambda p, x: squares(x @ (p["w"] + p["w"].T)), {"w": draw(5, 5)}, draw.batch(5)


@case()
def permuted_weights(draw):
    order = np.array([2, 0, 3, 1], np.int32)

    def loss(p, x):
        h = jnp.tanh(x @ p["w"][:, order]) @ p["v"][np.ix_(order, order[::-1])]
        return squares(h) + squares(x @ jnp.take(p["u"], order[:3], axis=1))

    return loss, {"w": draw(5, 4), "v": draw(4, 4), "u": draw(5, 4)}, draw.batch(5)


@case()
def repeated_heads(draw):
    shared = np.array([0, 0, 1, 1, 1], np.int32)

    def loss(p, x):
        k = jnp.einsum("td,dhk->thk", x, jnp.repeat(p["k"], 2, axis=1))
        out = jnp.einsum("thk,hkd->td", k, jnp.repeat(p["out"], 2, axis=0))
        v = jnp.einsum("td,dhk->thk", x, p["v"][:, shared])
        tiled = x @ jnp.tile(p["t"], (1, 2)).reshape(5, -1)
        return (
            squares(out) + squares(v) + squares(tiled) + squares(jnp.tile(p["t"].T, (3, 1)) @ x.T)
        )

    params = {"k": draw(5, 2, 3), "out": draw(2, 3, 4), "v": draw(5, 2, 3), "t": draw(5, 2)}
    return loss, params, draw.batch(4, 5)


@case()
def heads_repeated_in_a_checkpointed_scan(draw):
    def loss(p, x):
        @jax.checkpoint
        def layer(h, p):
            w = jnp.repeat(p["w"], 2, axis=1).astype(h.dtype)
            return jnp.tanh(h @ jnp.pad(w, ((2, 0), (1, 1)))), None

        return squares(lax.scan(layer, x, p)[0])

    return loss, {"w": draw(3, 6, 3)}, draw.batch(8)


@case()
def weights_repeated_over_groups(draw):
    def loss(p, x):
        return squares(jnp.einsum("gi,gij->gj", x, jnp.broadcast_to(p["w"], (3, 5, 4))))

    return loss, {"w": draw(5, 4)}, draw.batch(3, 5)


@case()
def joined_to_weights_that_are_used_again(draw):
    def loss(p, x):
        h = x @ jnp.concatenate([p["w"], p["v"]], axis=1) + x @ jnp.concatenate([p["b"], p["b"]], 1)
        return squares(jnp.tanh(h[1:3]) @ p["w"].T)

    return loss, {"w": draw(5, 2), "v": draw(5, 2), "b": draw(5, 2)}, draw.batch(5)


@case()
def masked_layers_of_a_scan(draw):
    def loss(p, x):
        mask = np.broadcast_to(CHECKERBOARD, (3, 5, 5)).astype(np.float32)

        def layer(h, ws):
            return jnp.tanh(jnp.tanh(h @ ws[0]) @ ws[1]), None

        masked = p["w"] * mask.astype(x.dtype)
        return squares(lax.scan(layer, x, (masked, 0.5 * p["v"]))[0])

    return loss, {"w": draw(3, 5, 5), "v": draw(3, 5, 5)}, draw.batch(5)
