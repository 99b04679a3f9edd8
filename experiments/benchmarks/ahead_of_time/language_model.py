"""Decoder-only language models at the sizes that accelerators are bought for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.benchmarks._nets import cross_entropy

PyTree = Any


class Size(NamedTuple):
    """What a language model is made of; the vocabulary's embedding is also the output head."""

    layers: int
    width: int
    heads: int
    length: int
    vocabulary: int
    batch_size: int


SIZES = {
    "17M": Size(layers=4, width=512, heads=8, length=512, vocabulary=8192, batch_size=16),
    "1B": Size(layers=16, width=2048, heads=16, length=2048, vocabulary=32768, batch_size=256),
}


def shapes(size: Size, batch_size: int) -> tuple[PyTree, PyTree]:
    """Shapes and dtypes of the parameters (float32) and of a batch of token sequences."""
    width, stack = size.width, (size.layers, size.width)
    params = {
        "embedding": (size.vocabulary, width),
        "layers": {
            "attention_scale": stack,
            "query_key_value": (*stack, 3 * width),
            "attention_out": (*stack, width),
            "mlp_scale": stack,
            "mlp_in": (*stack, 4 * width),
            "mlp_out": (size.layers, 4 * width, width),
        },
        "final_scale": (width,),
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        params,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    tokens = jax.ShapeDtypeStruct((batch_size, size.length + 1), jnp.int32)
    return params, {"tokens": tokens}


def loss_fn(
    size: Size, sharding: jax.sharding.Sharding | None = None
) -> Callable[[PyTree, PyTree], Array]:
    """Mean cross-entropy of the next tokens of one sequence.

    Pre-norm layers under `lax.scan`, each rematerialised, that compute in bfloat16 and keep norms,
    softmax and the loss in float32; rotary positions.

    Args:
      size: Of the model.
      sharding: Of one sequence's activations, (length, width). A vmap with `spmd_axis_name` adds
        the axis of the batch to it, without which a compiler that also finds the parameters split
        over that axis (FSDP) may hold the whole batch on every device.

    Returns:
      The loss, a function of (params, example).
    """

    def placed(x: Array) -> Array:
        if sharding is None:
            return x
        there: Array = lax.with_sharding_constraint(x, sharding)
        return there

    def layer(x: Array, p: PyTree) -> tuple[Array, None]:
        return placed(_layer(size.heads, placed(x), p)), None

    def loss(params: PyTree, example: PyTree) -> Array:
        tokens = example["tokens"]
        embedding = params["embedding"].astype(jnp.bfloat16)
        x, _ = lax.scan(jax.checkpoint(layer), placed(embedding[tokens[:-1]]), params["layers"])
        logits = _rms_norm(x, params["final_scale"]) @ embedding.T
        return jnp.mean(cross_entropy(logits.astype(jnp.float32), tokens[1:]))

    return loss


def _layer(heads: int, x: Array, p: PyTree) -> Array:
    length, width = x.shape
    w = {name: leaf.astype(jnp.bfloat16) for name, leaf in p.items() if leaf.ndim == 2}
    qkv = _rms_norm(x, p["attention_scale"]) @ w["query_key_value"]
    query, key, value = jnp.moveaxis(qkv.reshape(length, 3, heads, width // heads), 1, 0)
    attended = jax.nn.dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True)
    x = x + attended.reshape(length, width) @ w["attention_out"]
    hidden = jax.nn.gelu(_rms_norm(x, p["mlp_scale"]) @ w["mlp_in"])
    out: Array = x + hidden @ w["mlp_out"]
    return out


def _rotated(x: Array) -> Array:
    """Rotary positions for x of shape (length, heads, features)."""
    length, _, features = x.shape
    rates = 1e4 ** (-jnp.arange(0, features, 2) / features)
    angles = (jnp.arange(length)[:, None] * rates[None])[:, None]  # (length, 1, features / 2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _rms_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (normed * scale[None]).astype(x.dtype)
