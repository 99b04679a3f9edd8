"""Tables looked up by one index or several, in all the ways that indexing and vmap write them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.cabs_jax.moments.zoo.case import add, case, squares


@case()
def rows_and_columns_by_a_scalar(draw):
    def loss(p, e):
        row, column = p["rows"][e["i"]], p["columns"][:, e["i"]]
        return squares(row) + squares(column) + squares(p["entries"][e["i"], e["j"]])

    params = {"rows": draw(9, 5), "columns": draw(3, 9), "entries": draw(9, 5)}
    return loss, params, {"i": draw.tokens(low=-9), "j": draw.tokens(low=-5, high=5)}


@case()
def bias_of_the_user(draw):
    def loss(p, e):
        score = jnp.sum(p["users"][e["user"]] * p["films"][e["film"]])
        return jnp.tanh(score + p["bias"][e["user"]] + p["mean"][e["film"], 0])

    params = {"users": draw(9, 4), "films": draw(7, 4), "bias": draw(9), "mean": draw(7, 1)}
    return loss, params, {"user": draw.tokens(), "film": draw.tokens(high=7)}


@case()
def vmapped_embedding(draw):
    def loss(p, tokens):
        rows = jax.vmap(lambda token: p["table"][token])(tokens)
        pairs = jax.vmap(lambda token: p["square"][token, token])(tokens)
        return (
            squares(rows)
            + squares(pairs)
            + squares(jax.vmap(jax.vmap(jnp.take, (None, 0)), (0, None))(p["flat"], tokens))
        )

    params = {"table": draw(9, 5), "square": draw(9, 9), "flat": draw(2, 9)}
    return loss, params, draw.tokens(6, high=4)


@case()
def a_table_for_each_position(draw):
    def loss(p, tokens):
        rows = jax.vmap(lambda table, token: table[token])(p["tables"], tokens)
        picked = jnp.take_along_axis(p["logits"], tokens[:, None], 1)
        return squares(rows) + squares(picked)

    params = {"tables": draw(4, 9, 5), "logits": draw(4, 9)}
    return loss, params, draw.tokens(4)


@case()
def expert_picked_by_index(draw):
    def loss(p, e):
        h = jnp.tanh(e["x"] @ p["w"][e["expert"]] + p["b"][e["expert"]])
        return squares(h @ p["v"])

    batch = {"x": draw.batch(5), "expert": draw.tokens(high=3)}
    return loss, {"w": draw(3, 5, 4), "b": draw(3, 4), "v": draw(4, 2)}, batch


@case()
def a_long_text(draw):
    def loss(p, tokens):
        bag = jnp.mean(p["table"][tokens], 0) + jnp.mean((0.5 * p["scaled"])[tokens], 0)
        masked = (p["masked"] * jnp.arange(0, 500, dtype=jnp.float32)[:, None] / 500)[tokens]
        return squares(3 * bag @ p["w"]) + squares(jnp.mean(masked, 0))

    params = {"table": draw(500, 3), "scaled": draw(500, 3), "masked": draw(500, 2), "w": draw(3)}
    return loss, params, draw.tokens(200, high=500) // draw.tokens(200, low=1, high=20)


@case()
def picked_weights_met_once(draw):
    def loss(p, e):
        i, x = e["expert"], e["x"]
        h = jnp.tanh(jnp.einsum("d,df->f", x, p["inside a call"][i]))
        h = jnp.tanh(lax.dynamic_index_in_dim(p["transposed"], i, 0, keepdims=False).T @ h)
        h = jax.checkpoint(lambda w, h: jnp.tanh(h @ w[i]))(p["checkpointed"], h)
        h = jnp.tanh(h @ p["a part"][i][:, 1:])
        h = jnp.tanh(jnp.einsum("gd,gdf->gf", h.reshape(2, 2), p["groups"][i]))
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w[i]), None), h.reshape(4), p["layers"])
        return squares(h) + jnp.tanh(p["users"][i] @ p["films"][2 - i]) * jnp.sum(h)

    params = {
        "inside a call": draw(3, 5, 4),
        "transposed": draw(3, 4, 4),
        "checkpointed": draw(3, 4, 4),
        "a part": draw(3, 4, 5),
        "groups": draw(3, 2, 2, 2),
        "layers": draw(2, 3, 4, 4),
        "users": draw(3, 4),
        "films": draw(3, 4),
    }
    return loss, params, {"x": draw.batch(5), "expert": draw.tokens(high=3)}


@case(held="squared")
def picked_weights_met_otherwise(draw):
    def loss(p, e):
        i, x = e["expert"], e["x"]
        w = {name: table[i] for name, table in p.items()}
        w["absent"] = p["absent"].at[i + 1].get(mode="fill", fill_value=1)
        w["scaled"], w["squared"] = (0.5 * p["scaled"])[i], jnp.square(p["squared"])[i]
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ w["in every step"]), None), x, length=2)
        _, last = lax.scan(lambda w, _: (jnp.tanh(w), w @ x), w["start of a carry"], length=2)
        return (
            squares(jnp.stack([x, jnp.flip(x)]) @ w["two positions"])
            + squares(jnp.tanh(x @ w["twice"]) @ w["twice"])
            + squares(h)
            + squares(last)
            + jnp.sin(w["square of a row"] @ w["square of a row"])
            + squares(x @ w["absent"] + x @ w["scaled"])
            + squares(x @ w["squared"])
        )

    names = ("two positions", "twice", "absent", "start of a carry", "in every step", "scaled")
    params = {name: draw(3, 4, 4) for name in (*names, "squared")}
    params["square of a row"] = draw(3, 4)
    return loss, params, {"x": draw.batch(4), "expert": draw.tokens(high=3)}


@case()
def experts_picked_for_each_token(draw):
    def loss(p, e):
        gates, picked = lax.top_k(jax.nn.softmax(e["x"] @ p["gate"]), 2)
        hidden = jnp.tanh(jnp.einsum("td,tkdf->tkf", e["x"], p["w"][picked]))
        return squares(jnp.einsum("tkf,tk->tf", hidden, gates))

    return loss, {"gate": draw(4, 3), "w": draw(3, 4, 5)}, {"x": draw.batch(6, 4)}


@case()
def embedding_bag(draw):
    def loss(p, e):
        kept = (e["words"] < 7).astype(p["table"].dtype)
        bag = jnp.sum(p["table"][e["words"]] * jnp.broadcast_to(kept[:, None], (6, 5)), 0)
        return squares(bag @ p["w"]) + squares(jnp.mean(p["table"][e["title"]], 0))

    batch = {"words": draw.tokens(6), "title": draw.tokens(3)}
    return loss, {"table": draw(9, 5), "w": draw(5, 3)}, batch


@case()
def words_added_up(draw):
    def loss(p, e):
        words, kept, x = e["words"], e["kept"], e["x"]
        rows = {name: table[words] for name, table in p.items() if name.islower()}
        absent = p["Absent"].at[words + 4].get(mode="fill", fill_value=0)
        in_place = jax.vmap(lambda table, word: table[word])(p["In place"], words)
        layers = lax.scan(
            lambda h, table: (h + jnp.tanh(jnp.mean(table[words], 0)), None), x, p["Layers"]
        )[0]
        pooled = [
            jnp.mean(rows["mean"], 0),
            jnp.sum(rows["masked"] * kept[:, None], 0) / (1 + jnp.sum(kept)),
            jnp.sum(jnp.where(kept[:, None] > 0, rows["chosen"], 1.0), 0),
            jnp.mean(rows["where"], 0, where=kept[:, None] > 0),
            jnp.tanh(e["scores"]) @ rows["product"],
            rows["transposed"].T @ e["scores"],
            jnp.sum(-rows["gated"] * x[None], 0),
            jnp.sum(p["Columns"][:, words], 1),
            jnp.sum(p["Pages"][words.reshape(2, 3)], (0, 1)),
            jnp.sum(p["Entries"][words, words % 4]) * x,
            jnp.sum(jax.vmap(lambda word: p["Vmapped"][word])(words), 0),
            jnp.sum((0.5 * p["Scaled"])[words], 0),
            jnp.sum((p["Rows"] * jnp.arange(9.0)[:, None])[words], 0),
            jnp.sum(absent, 0),
            jnp.sum(in_place, 0),
            jnp.sum(jax.checkpoint(lambda table: table[words])(p["Again"]), 0),
            layers,
        ]
        return squares(jnp.stack(pooled) * 0.3)

    names = ("mean", "masked", "chosen", "where", "product", "transposed", "gated")
    titles = ("Pages", "Vmapped", "Scaled", "Rows", "Absent", "Again")
    params = {name: draw(9, 5) for name in (*names, *titles)}
    params |= {"Columns": draw(5, 9), "Entries": draw(9, 4), "In place": draw(6, 9, 5)}
    params["Layers"] = draw(2, 9, 5)
    batch = {"words": draw.tokens(6), "scores": draw.batch(6), "x": draw.batch(5)}
    return loss, params, batch | {"kept": draw.tokens(6, high=2).astype(np.float32)}


@case()
def words_added_up_and_more(draw):
    def loss(p, e):
        words = e["words"]
        rows = {name: table[words] for name, table in p.items()}
        _, turned = lax.scan(lambda h, row: (h, jnp.tanh(row)), 0.0, rows["in turn"])
        return (
            squares(jnp.mean(rows["seen"], 0))
            + squares(rows["seen"])
            + squares(jnp.mean(rows["two sums"], 0) * (e["scores"] @ rows["two sums"]))
            + squares(jnp.sum(rows["pairs"].reshape(2, 3, 5), 1))
            + squares(jnp.sum(rows["bent"] * jnp.tanh(e["x"]), 0))
            + squares(jnp.mean(jnp.tanh(rows["curved"]), 0))
            + squares(jnp.max(rows["largest"], 0))
            + squares(jnp.mean(turned, 0))
        )

    names = ("seen", "two sums", "pairs", "bent", "curved", "largest", "in turn")
    batch = {"words": draw.tokens(6), "scores": draw.batch(6), "x": draw.batch(6, 5)}
    return loss, {name: draw(9, 5) for name in names}, batch


@case()
def windows_of_a_table(draw):
    def loss(p, e):
        window = lax.dynamic_slice(p["map"], (e["row"], jnp.int32(1), e["column"]), (2, 3, 4))
        crops = jax.vmap(lambda i: lax.dynamic_slice_in_dim(p["bank"], i, 4, 1))(e["starts"])
        return squares(window * jnp.broadcast_to(e["x"], window.shape)) + squares(crops)

    batch = {"row": draw.tokens(high=6), "column": draw.tokens(high=7), "x": draw.batch(4)}
    batch["starts"] = draw.tokens(3, high=7)
    return loss, {"map": draw(6, 4, 7), "bank": draw(3, 9)}, batch


@case()
def row_of_a_table_that_is_the_head_too(draw):
    def loss(p, e):
        return squares(p["table"] @ jnp.tanh(p["table"][e["token"]])) + squares(e["x"] @ p["w"])

    return (
        loss,
        {"table": draw(9, 5), "w": draw(4, 2)},
        {"token": draw.tokens(), "x": draw.batch(4)},
    )


@case()
def grouped_query_attention(draw):
    def loss(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
        k, v = (jnp.repeat(heads, 2, axis=1) for heads in (k, v))
        return squares(jax.nn.dot_product_attention(q, k, v))

    return loss, {"q": draw(4, 4, 3), "k": draw(4, 2, 3), "v": draw(4, 2, 3)}, draw.batch(5, 4)


@case(held="b")
def lookups_inside_scan(draw):
    def loss(p, tokens):
        def cell(h, token):
            return jnp.tanh(add(h @ p["w"] + p["table"][token], p["b"])), None

        return squares(lax.scan(cell, jnp.zeros(4, p["w"].dtype), tokens)[0])

    return loss, {"table": draw(9, 4), "w": draw(4, 4), "b": draw(4)}, draw.tokens(5)
