"""Losses that people write, one for each way to come by a weight, with random examples.

Each is a small model with one idiom that weighs: what it costs to measure the gradient variance
there is what the model shows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.benchmarks._nets import Net

PyTree = Any
WIDTH, LENGTH, ROWS, EXPERTS = 256, 32, 8192, 8


def build(name: str) -> Net:
    """Builds one of `NAMES`."""
    loss, shapes, examples = _IDIOMS[name]
    random = np.random.default_rng(0)
    params = {
        key: jnp.asarray(random.normal(size=shape) / np.sqrt(WIDTH), jnp.float32)
        for key, shape in shapes.items()
    }
    return Net(loss, params, examples, (128,))


def vectors(number: int) -> dict[str, np.ndarray]:
    """A vector, an expert and a row of a table."""
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(number, WIDTH)).astype(np.float32),
        "expert": random.integers(0, EXPERTS, number, np.int32),
        "row": random.integers(0, ROWS, number, np.int32),
    }


def sequences(number: int) -> dict[str, np.ndarray]:
    """A sequence of vectors, and one of tokens."""
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(number, LENGTH, WIDTH)).astype(np.float32),
        "tokens": random.integers(0, ROWS, (number, LENGTH), np.int32),
    }


def texts(number: int) -> dict[str, np.ndarray]:
    """A text of tokens, of which few are common and most are rare."""
    tokens = np.random.default_rng(0).zipf(1.2, (number, 16 * LENGTH)) % ROWS
    return {"tokens": tokens.astype(np.int32)}


def points(number: int) -> dict[str, np.ndarray]:
    """Points in the plane."""
    return {"x": np.random.default_rng(0).normal(size=(number, 2)).astype(np.float32)}


def curved(x: Array) -> Array:
    """A scalar whose derivative depends on every entry."""
    return jnp.sum(jnp.square(jnp.tanh(x)))


def _row(p: PyTree, e: PyTree) -> Array:
    return curved(p["table"][e["row"]] @ p["w"])


def _embedding(p: PyTree, e: PyTree) -> Array:
    return curved(jax.vmap(lambda token: p["table"][token])(e["tokens"]) @ p["w"])


def _bag(p: PyTree, e: PyTree) -> Array:
    return curved(jnp.mean(p["table"][e["tokens"]], axis=0) @ p["w"])


def _column(p: PyTree, e: PyTree) -> Array:
    return curved(e["x"] @ p["w"] + p["columns"][:, e["expert"]])


def _expert(p: PyTree, e: PyTree) -> Array:
    return curved(jnp.tanh(e["x"] @ p["experts"][e["expert"]]) @ p["w"])


def _merged(p: PyTree, e: PyTree) -> Array:
    return curved(e["x"] @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1))


def _padded(p: PyTree, e: PyTree) -> Array:
    return curved(e["x"] @ jnp.pad(p["w"], ((0, 0), (0, 8))))


def _scaled(p: PyTree, e: PyTree) -> Array:
    return curved(jnp.tanh(e["x"] @ (0.1 * p["w"])) @ (p["v"] / 4))


def _masked(p: PyTree, e: PyTree) -> Array:
    return curved(jnp.tanh(e["x"] @ jnp.tril(p["w"])) @ jnp.triu(p["v"]))


def _flipped(p: PyTree, e: PyTree) -> Array:
    return curved(e["x"] @ jnp.roll(p["w"], 1, axis=1)[::-1])


def _grouped(p: PyTree, e: PyTree) -> Array:
    q, k, v = (jnp.reshape(e["x"] @ p[name], (LENGTH, -1, 32)) for name in ("q", "k", "v"))
    k, v = (jnp.repeat(heads, 4, axis=1) for heads in (k, v))
    return curved(jax.nn.dot_product_attention(q, k, v).reshape(LENGTH, WIDTH) @ p["o"])


def _low_rank(p: PyTree, e: PyTree) -> Array:
    return curved(e["x"] @ (lax.stop_gradient(p["w"]) + p["a"] @ p["b"]))


def _weight_norm(p: PyTree, e: PyTree) -> Array:
    return curved(e["x"] @ (p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]))


def _spectral_norm(p: PyTree, e: PyTree) -> Array:
    u = p["w"] @ jnp.ones(WIDTH)
    v = u @ p["w"]
    u, v = (lax.stop_gradient(x / jnp.linalg.norm(x)) for x in (u, v))
    return curved(e["x"] @ (p["w"] / (u @ p["w"] @ v)))


@jax.custom_vjp
def _dense(w: Array, x: Array) -> Array:
    return jnp.tanh(x @ w)


def _dense_forward(w: Array, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    y = _dense(w, x)
    return y, (w, x, y)


def _dense_backward(saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array]:
    w, x, y = saved
    cotangent = cotangent * (1 - jnp.square(y))
    return x.T @ cotangent, cotangent @ w.T


_dense.defvjp(_dense_forward, _dense_backward)


def _custom(p: PyTree, e: PyTree) -> Array:
    return curved(_dense(p["v"], _dense(p["w"], e["x"])))


def _filter(p: PyTree, e: PyTree) -> Array:
    spectrum = jnp.fft.rfft(e["x"], axis=0) * lax.complex(p["real"], p["imaginary"])
    return curved(jnp.fft.irfft(spectrum, LENGTH, axis=0) @ p["w"])


def _depthwise(p: PyTree, e: PyTree) -> Array:
    layout = ("NWC", "WIO", "NWC")
    x = e["x"][None].astype(p["kernel"].dtype)
    mixed = lax.conv_general_dilated(
        x, p["kernel"], (1,), "SAME", None, None, layout, feature_group_count=WIDTH
    )
    return curved(mixed[0] @ p["w"])


def _loop(p: PyTree, e: PyTree) -> Array:
    x = e["x"].astype(p["layers"].dtype)
    return curved(lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["layers"][i]), x))


def _laplacian(p: PyTree, e: PyTree) -> Array:
    def u(x: Array) -> Array:
        hidden = jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"])
        return jnp.sum(hidden @ p["last"])

    return jnp.square(jnp.trace(jax.hessian(u)(e["x"])) + u(e["x"]))


_SQUARE = (WIDTH, WIDTH)
_NARROW = (WIDTH, WIDTH // 4)
_SPECTRUM = (LENGTH // 2 + 1, WIDTH)
_IDIOMS: dict[
    str,
    tuple[
        Callable[[PyTree, PyTree], Array],
        dict[str, tuple[int, ...]],
        Callable[[int], PyTree],
    ],
] = {
    "table[i]": (_row, {"table": (ROWS, 64), "w": (64, 64)}, vectors),
    "vmapped embedding": (_embedding, {"table": (ROWS, 64), "w": (64, 64)}, sequences),
    "embedding bag": (_bag, {"table": (ROWS, 64), "w": (64, 64)}, sequences),
    "bag of 512 words": (_bag, {"table": (ROWS, 64), "w": (64, 64)}, texts),
    "+ columns[:, i]": (_column, {"columns": (WIDTH, EXPERTS), "w": _SQUARE}, vectors),
    "x @ experts[i]": (_expert, {"experts": (EXPERTS, *_SQUARE), "w": _SQUARE}, vectors),
    "x @ concatenate": (_merged, {"q": _SQUARE, "k": _SQUARE, "v": _SQUARE}, vectors),
    "concatenate, sequence": (_merged, {"q": _SQUARE, "k": _SQUARE, "v": _SQUARE}, sequences),
    "x @ pad(w)": (_padded, {"w": _SQUARE}, vectors),
    "x @ (0.1 * w)": (_scaled, {"w": _SQUARE, "v": _SQUARE}, vectors),
    "x @ (mask * w)": (_masked, {"w": _SQUARE, "v": _SQUARE}, vectors),
    "mask, sequence": (_masked, {"w": _SQUARE, "v": _SQUARE}, sequences),
    "flip and roll": (_flipped, {"w": _SQUARE}, vectors),
    "repeated heads": (
        _grouped,
        {"q": _SQUARE, "k": _NARROW, "v": _NARROW, "o": _SQUARE},
        sequences,
    ),
    "merged LoRA": (_low_rank, {"w": _SQUARE, "a": (WIDTH, 8), "b": (8, WIDTH)}, vectors),
    "weight norm": (_weight_norm, {"v": _SQUARE, "g": (WIDTH,)}, vectors),
    "spectral norm": (_spectral_norm, {"w": _SQUARE}, vectors),
    "custom_vjp, sequence": (_custom, {"w": _SQUARE, "v": _SQUARE}, sequences),
    "filter of a spectrum": (
        _filter,
        {"real": _SPECTRUM, "imaginary": _SPECTRUM, "w": _SQUARE},
        sequences,
    ),
    "depthwise convolution": (_depthwise, {"kernel": (5, 1, WIDTH), "w": _SQUARE}, sequences),
    "fori_loop over layers": (_loop, {"layers": (4, *_SQUARE)}, vectors),
    "Laplacian of a net": (
        _laplacian,
        {"first": (2, 64), "second": (64, 64), "last": (64, 1)},
        points,
    ),
}
NAMES = tuple(_IDIOMS)
