"""The nets that are benchmarked, with random examples of the right shapes."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cabs_jax.statistics import PyTree
from experiments.training import models


class Net(NamedTuple):
    """A net to benchmark.

    Attributes:
      loss: `(params, example) -> loss`, a scalar.
      params: Initial parameters.
      examples: `number -> examples`, numpy arrays with a leading example axis; the first of a
        larger number are those of a smaller one.
      batch_sizes: Those it is measured at.
    """

    loss: Callable[[PyTree, PyTree], Array]
    params: PyTree
    examples: Callable[[int], PyTree]
    batch_sizes: tuple[int, ...] = (16, 128, 512)


def build(name: str) -> Net:
    """Builds one of `NAMES`."""
    return _NETS[name]()


def random_images(shape: tuple[int, ...], number: int) -> dict[str, np.ndarray]:
    """Uniform pixels and labels 0 to 9."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2048, *shape), np.uint8)
    labels = random.integers(0, 10, 2048, np.int32)
    return {"input": images[:number], "label": labels[:number]}


def random_text(length: int, number: int) -> dict[str, np.ndarray]:
    """Tokens 0 to 255, few of them frequent, as bytes of text."""
    frequency = 1 / np.arange(3, 259)
    random = np.random.default_rng(0)
    tokens = random.choice(256, (2048, length), p=frequency / frequency.sum())
    return {"tokens": tokens[:number].astype(np.int32)}


def of_the_study(name: str, input_shape: tuple[int, int, int]) -> Net:
    """One of the nets that the experiments train."""
    model = models.build(name, input_shape, num_classes=10)
    return Net(model.loss, model.params, partial(random_images, input_shape))


def mlp(widths: tuple[int, ...] = (784, 512, 512, 10)) -> Net:
    """Dense layers with rectified linear units between them."""
    keys = jax.random.split(jax.random.key(0), len(widths) - 1)
    params = [
        {"kernel": _normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}
        for key, inputs, outputs in zip(keys, widths[:-1], widths[1:], strict=True)
    ]

    def loss(params: PyTree, example: PyTree) -> Array:
        *hidden, last = params
        x = _pixels(params, example)
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return cross_entropy(x @ last["kernel"] + last["bias"], example["label"])

    return Net(loss, params, partial(random_images, widths[:1]))


def residual_cnn(width: int = 16, size: int = 32) -> Net:
    """Three residual blocks of two 3x3 convolutions, normalised over groups of 8 channels."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def convolution(window: int, inputs: int, outputs: int) -> PyTree:
        kernel = _normal(next(keys), (window, window, inputs, outputs))
        return {"kernel": kernel, "scale": jnp.ones(outputs), "shift": jnp.zeros(outputs)}

    def residual_block(inputs: int, outputs: int) -> PyTree:
        return {
            "conv1": convolution(3, inputs, outputs),
            "conv2": convolution(3, outputs, outputs),
            "shortcut": convolution(1, inputs, outputs),
        }

    params = {
        "stem": convolution(3, 3, width),
        "blocks": [residual_block(width * n, width * k) for n, k in ((1, 1), (1, 2), (2, 4))],
        "dense": {"kernel": _normal(next(keys), (4 * width, 10)), "bias": jnp.zeros(10)},
    }

    def normalised(p: dict[str, Array], x: Array, stride: int = 1) -> Array:
        x = lax.conv_general_dilated(
            x[None],
            p["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        groups = x.reshape(-1, x.shape[-1] // 8, 8)
        mean, var = (f(groups, axis=(0, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        x = ((groups - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape)
        return x * p["scale"][None, None] + p["shift"][None, None]

    def loss(params: PyTree, example: PyTree) -> Array:
        x = jax.nn.relu(normalised(params["stem"], _pixels(params, example)))
        for stride, block in zip((1, 2, 2), params["blocks"], strict=True):
            y = jax.nn.relu(normalised(block["conv1"], x, stride))
            y = normalised(block["conv2"], y)
            x = jax.nn.relu(y + normalised(block["shortcut"], x, stride))
        dense = params["dense"]
        logits = x.mean((0, 1)) @ dense["kernel"] + dense["bias"]
        return cross_entropy(logits, example["label"])

    return Net(loss, params, partial(random_images, (size, size, 3)))


def transformer(
    layers: int = 4, width: int = 128, length: int = 64, heads: int = 4, vocabulary: int = 256
) -> Net:
    """A decoder: scanned pre-norm layers, and the embedding used again as output head."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    params = {
        "embedding": 0.02 * jax.random.normal(next(keys), (vocabulary, width)),
        "position": 0.02 * jax.random.normal(next(keys), (length, width)),
        "layers": {
            "attention_scale": jnp.ones((layers, width)),
            "query_key_value": _normal(
                next(keys), (layers, width, 3, heads, width // heads), width
            ),
            "attention_out": _normal(next(keys), (layers, heads, width // heads, width), width),
            "mlp_scale": jnp.ones((layers, width)),
            "mlp_in": _normal(next(keys), (layers, width, 4 * width), width),
            "mlp_out": _normal(next(keys), (layers, 4 * width, width), 4 * width),
        },
        "final_scale": jnp.ones(width),
    }

    def layer(x: Array, p: dict[str, Array]) -> tuple[Array, None]:
        qkv = jnp.einsum("td,dchk->cthk", _rms_norm(x, p["attention_scale"]), p["query_key_value"])
        attended = jax.nn.dot_product_attention(*qkv, is_causal=True)
        x = x + jnp.einsum("thk,hkd->td", attended, p["attention_out"])
        y = jax.nn.gelu(_rms_norm(x, p["mlp_scale"]) @ p["mlp_in"])
        return x + y @ p["mlp_out"], None

    def loss(params: PyTree, example: PyTree) -> Array:
        tokens = example["tokens"]
        x = params["embedding"][tokens[:-1]] + params["position"]
        x, _ = lax.scan(layer, x, params["layers"])
        logits = _rms_norm(x, params["final_scale"]) @ params["embedding"].T
        return jnp.mean(cross_entropy(logits, tokens[1:]))

    return Net(loss, params, partial(random_text, length + 1), batch_sizes=(8, 64))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Of logits (..., classes) and integer labels (...)."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _rms_norm(x: Array, scale: Array) -> Array:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None]


def _pixels(params: PyTree, example: PyTree) -> Array:
    """Pixels in [-1, 1], in the precision of the parameters."""
    pixels: Array = example["input"].astype(jax.tree.leaves(params)[0].dtype)
    return pixels / 127.5 - 1


def _normal(key: Array, shape: tuple[int, ...], inputs: int | None = None) -> Array:
    fan_in = inputs or math.prod(shape[:-1])
    return math.sqrt(2 / fan_in) * jax.random.normal(key, shape)


_NETS: dict[str, Callable[[], Net]] = {
    "mnist_2c2d": partial(of_the_study, "mnist_2c2d", (28, 28, 1)),
    "cifar10_2c3d": partial(of_the_study, "cifar10_2c3d", (32, 32, 3)),
    "mlp": mlp,
    "residual_cnn": residual_cnn,
    "transformer": transformer,
}
NAMES = tuple(_NETS)
