"""Matrix products and look-ups."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.cabs_jax.moments.zoo.case import add, case, squares


@case(held="b")
def dense(draw):
    def loss(p, x):
        return squares(x @ p["w"] + p["b"])

    return loss, {"w": draw(5, 7), "b": draw(7)}, draw.batch(5)


@case(held="b")
def weights_on_the_left(draw):
    def loss(p, x):
        return squares(p["v"] @ jnp.tanh(p["w"].T @ x + p["b"]))

    return loss, {"w": draw(5, 7), "b": draw(7), "v": draw(3, 7)}, draw.batch(5)


@case(held="b")
def short_sequence(draw):
    def loss(p, x):
        return squares(add(x @ p["w"], p["b"]))

    return loss, {"w": draw(9, 7), "b": draw(7)}, draw.batch(3, 9)


@case(held="b")
def long_sequence(draw):
    def loss(p, x):
        return squares(add(x @ p["w"], p["b"]))

    return loss, {"w": draw(3, 4), "b": draw(4)}, draw.batch(24, 3)


@case()
def einsum_projections(draw):
    def loss(p, e):
        heads = jnp.einsum("td,dhk->thk", e["x"], p["in"])
        out = jnp.einsum("thk,hkd->td", jnp.tanh(heads), p["out"])
        return squares(out) + squares(jnp.einsum("gtd,gdk->tgk", e["y"], p["grouped"]))

    params = {"in": draw(5, 2, 3), "out": draw(2, 3, 4), "grouped": draw(3, 4, 2)}
    return loss, params, {"x": draw.batch(6, 5), "y": draw.batch(3, 5, 4)}


@case()
def causal_attention(draw):
    def loss(p, x):
        q, k, v = (jnp.einsum("td,dhk->htk", x, w) for w in jnp.split(p["qkv"], 3, axis=2))
        scores = jnp.where(jnp.tri(6, dtype=bool), jnp.einsum("htk,hsk->hts", q, k), -1e9)
        mixed = jnp.einsum("hts,hsk->htk", jax.nn.softmax(scores), v)
        return squares(jnp.einsum("htk,hkd->td", mixed, p["out"]))

    return loss, {"qkv": draw(4, 2, 9), "out": draw(2, 3, 4)}, draw.batch(6, 4)


@case()
def library_attention(draw):
    def loss(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
        return squares(jax.nn.dot_product_attention(q, k, v, is_causal=True))

    return loss, {name: draw(4, 2, 4) for name in "qkv"}, draw.batch(6, 4)


@case()
def bilinear(draw):
    def loss(p, e):
        return squares(e["x"] @ p["w"] @ e["y"]) + squares(
            jnp.einsum("i,ijk,k->j", e["x"], p["tensor"], e["y"])
        )

    return (
        loss,
        {"w": draw(5, 3), "tensor": draw(5, 4, 3)},
        {"x": draw.batch(5), "y": draw.batch(3)},
    )


@case()
def soft_mixture_of_experts(draw):
    def loss(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, p["in"]))
        return squares(jnp.einsum("tef,efd,te->td", hidden, p["out"], gates))

    params = {"gate": draw(4, 3), "in": draw(3, 4, 5), "out": draw(3, 5, 4)}
    return loss, params, draw.batch(6, 4)


@case()
def hard_mixture_of_experts(draw):
    def loss(p, e):
        return squares(jnp.einsum("td,tdf->tf", e["x"], p["experts"][e["expert"]]))

    batch = {"x": draw.batch(6, 4), "expert": draw.tokens(6, high=3)}
    return loss, {"experts": draw(3, 4, 5)}, batch


@case()
def embedding_of_repeated_tokens(draw):
    def loss(p, tokens):
        return squares(p["table"][tokens] @ p["w"])

    return loss, {"table": draw(9, 5), "w": draw(5, 3)}, draw.tokens(12, high=4)


def take_out_of_range(mode):
    """An embedding whose tokens, negative ones included, may be out of range."""

    def embedding(draw):
        def loss(p, tokens):
            fill = {"fill_value": 0.5} if mode == "fill" else {}
            rows = jnp.take(p["table"], tokens, 0, mode=mode, **fill)
            return squares(rows) + squares(jnp.take(p["other"], tokens, 1, mode=mode, **fill))

        params = {"table": draw(9, 5), "other": draw(3, 9)}
        return loss, params, draw.tokens(2, 4, low=-20, high=20)

    embedding.__name__ = f"embedding_out_of_range_with_mode_{mode}"
    return embedding


for _mode in ("clip", "wrap", "fill"):
    case()(take_out_of_range(_mode))


@case()
def embedding_of_tokens_promised_in_bounds(draw):
    def loss(p, tokens):
        return squares(p["table"].at[tokens].get(mode="promise_in_bounds"))

    return loss, {"table": draw(9, 5)}, draw.tokens(6, low=-9)


@case()
def embedding_of_the_label(draw):
    def loss(p, e):
        return squares(p["table"][e["label"]] * (e["x"] @ p["w"]))

    batch = {"label": draw.tokens(), "x": draw.batch(5)}
    return loss, {"table": draw(9, 4), "w": draw(5, 4)}, batch


@case()
def embedding_by_one_hot(draw):
    def loss(p, tokens):
        return squares(jax.nn.one_hot(tokens, 9, dtype=p["table"].dtype) @ p["table"])

    return loss, {"table": draw(9, 5)}, draw.tokens(6)


@case()
def window_of_a_table(draw):
    def loss(p, e):
        window = lax.dynamic_slice_in_dim(p["table"], e["start"], 4)
        return squares(window * e["x"])

    return loss, {"table": draw(9, 5)}, {"start": draw.tokens(high=6), "x": draw.batch(4, 5)}


@case()
def entries_of_a_table(draw):
    def loss(p, e):
        return squares(p["table"][e["row"], e["column"]] + squares(p["other"][e["row"]]))

    batch = {"row": draw.tokens(6), "column": draw.tokens(6, high=5)}
    return loss, {"table": draw(9, 5), "other": draw(9, 2)}, batch
