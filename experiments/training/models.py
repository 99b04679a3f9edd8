"""The nets of the study in flax, as pure functions of one image or one sequence of bytes.

A net takes raw uint8 pixels: what is done to them first belongs to it, not to the data set. All
activations of nets for images are rectified linear units, except in `digits_mlp`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.nn import initializers

Params = dict[str, Any]


class Model(NamedTuple):
    """A net with a softmax cross-entropy loss.

    Attributes:
      params: Initial parameters, a dict of dicts of float32 arrays.
      apply: `(params, input) -> logits`, from (height, width, channels) to (num_classes,), or
        from the bytes (length,) to the logits (length, num_classes) of those that follow them.
      predict: `(params, inputs) -> logits`, the same with a leading batch axis.
      loss: `(params, example) -> loss` of an `{"input", "label"}` without batch axis, a float32
        scalar, the mean over a sequence.
    """

    params: Params
    apply: Callable[[Params, Array], Array]
    predict: Callable[[Params, Array], Array]
    loss: Callable[[Params, Mapping[str, Array]], Array]


def build(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    width: float = 1.0,
    seed: int = 0,
    call_layer: Callable[[nnx.Module, Array], Array] | None = None,
) -> Model:
    """Builds a net and initialises it.

    Args:
      name: One of `NAMES`.
      input_shape: (height, width, channels) of the images, or (length,) of the sequences.
      num_classes: Number of classes.
      width: Multiplier of all channels and hidden units, for small machines. Where a published
        initialisation has a fixed standard deviation σ, a layer whose fan in shrinks from n to n'
        gets σ·√(n/n'), so that signals keep the size that they have at width 1.
      seed: Seed of the initial parameters.
      call_layer: What is called with each convolution or dense layer and its inputs in the layer's
        place.

    Raises:
      ValueError: If the name is unknown, the width or number of classes is not positive, or the
        inputs are not the net's or too small for it.
    """
    if name not in _NETS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(NAMES)}.")
    net, smallest = _NETS[name]
    axes = ("height", "width", "channels") if smallest else ("length",)
    if len(input_shape) != len(axes) or min(input_shape) < 1:
        raise ValueError(
            f"the inputs of {name} must have a shape ({', '.join(axes)}), got {input_shape}."
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}.")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be positive and finite, got {width}.")
    if smallest and min(input_shape[:2]) < smallest:
        raise ValueError(
            f"{name} needs images of at least {smallest}x{smallest} pixels, got {input_shape}."
        )

    def scaled(units: int) -> int:
        return max(1, round(units * width))

    graph, state = nnx.split(net(input_shape, num_classes, scaled, nnx.Rngs(seed)))

    def predict(params: Params, inputs: Array) -> Array:
        net = nnx.merge(graph, params)
        if call_layer is not None:
            for layer_name, layer in list(vars(net).items()):
                if isinstance(layer, nnx.Conv | nnx.Linear):
                    object.__setattr__(net, layer_name, partial(call_layer, layer))
        logits: Array = net(inputs)
        return logits

    def apply(params: Params, one: Array) -> Array:
        return predict(params, one[None])[0]

    def loss(params: Params, example: Mapping[str, Array]) -> Array:
        logits = apply(params, example["input"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])
        value: Array = jnp.mean(losses)
        return value

    return Model(nnx.to_pure_dict(state), apply, predict, loss)


def truncated_normal(stddev: float) -> Callable[..., Array]:
    """Normal numbers cut at two `stddev`, as TensorFlow's: the variance lost is not restored.

    They are those of `jax.nn.initializers.truncated_normal`, drawn as a vector: XLA takes seconds
    to compile the draw of a convolution's four axes.
    """

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        flat = initializers.truncated_normal(stddev)(key, (math.prod(shape),), dtype)
        return flat.reshape(shape)

    return init


def xavier_normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Truncated normal numbers of variance 2 / (fan in + fan out), for a convolution's kernel."""
    *window, inputs, outputs = shape
    variance = 2 / (math.prod(window) * (inputs + outputs))
    return truncated_normal(math.sqrt(variance) / _TRUNCATED_STDDEV)(key, shape, dtype)


def _scaled_normal(stddev: float, inputs: int, scaled: "_Scaled") -> Callable[..., Array]:
    """`truncated_normal`, larger where only `scaled(inputs)` of the published `inputs` are left."""
    return truncated_normal(stddev * math.sqrt(inputs / scaled(inputs)))


# Standard deviation of a standard normal cut at two.
_TRUNCATED_STDDEV = 0.87962566103423978
_Scaled = Callable[[int], int]
_max_pool_2 = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2), padding="SAME")
_max_pool_3 = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")


class Mnist2c2d(nnx.Module):
    """The CABS authors' net for MNIST: two convolutions, two dense layers; pixels in [0, 1]."""

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, scaled: _Scaled, rngs: nnx.Rngs
    ):
        height, width, channels = input_shape
        conv = partial(
            nnx.Conv, kernel_size=(5, 5), bias_init=initializers.constant(0.05), rngs=rngs
        )
        dense = partial(nnx.Linear, bias_init=initializers.constant(0.05), rngs=rngs)
        normal = partial(_scaled_normal, 0.01, scaled=scaled)
        self.conv1 = conv(channels, scaled(32), kernel_init=truncated_normal(0.01))
        self.conv2 = conv(scaled(32), scaled(64), kernel_init=normal(32))
        features = math.ceil(height / 4) * math.ceil(width / 4) * scaled(64)
        self.dense1 = dense(features, scaled(1024), kernel_init=normal(64))
        self.dense2 = dense(scaled(1024), num_classes, kernel_init=normal(1024))

    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = images.astype(jnp.float32) / 255
        x = _max_pool_2(nnx.relu(self.conv1(x)))
        x = _max_pool_2(nnx.relu(self.conv2(x)))
        x = x.reshape(len(x), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


class Cifar2c3d(nnx.Module):
    """The CABS authors' net for CIFAR-10: two convolutions, three dense layers.

    It sees the central 24x24 pixels, standardised per image.
    """

    crop = 24

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, scaled: _Scaled, rngs: nnx.Rngs
    ):
        channels = input_shape[2]
        normal = partial(_scaled_normal, scaled=scaled)
        conv = partial(nnx.Conv, kernel_size=(5, 5), rngs=rngs)
        dense = partial(nnx.Linear, bias_init=initializers.constant(0.1), rngs=rngs)
        self.conv1 = conv(channels, scaled(64), kernel_init=truncated_normal(0.05))
        self.conv2 = conv(
            scaled(64),
            scaled(64),
            kernel_init=normal(0.05, 64),
            bias_init=initializers.constant(0.1),
        )
        features = (self.crop // 4) ** 2 * scaled(64)
        self.dense1 = dense(features, scaled(384), kernel_init=normal(0.04, 64))
        self.dense2 = dense(scaled(384), scaled(192), kernel_init=normal(0.04, 384))
        self.dense3 = nnx.Linear(
            scaled(192), num_classes, kernel_init=normal(1 / 192, 192), rngs=rngs
        )

    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = standardize(central_crop(images, self.crop))
        x = _max_pool_3(nnx.relu(self.conv1(x)))
        x = _max_pool_3(nnx.relu(self.conv2(x)))
        x = x.reshape(len(x), -1)
        x = nnx.relu(self.dense1(x))
        x = nnx.relu(self.dense2(x))
        return self.dense3(x)


class Net3c3d(nnx.Module):
    """The net of DeepOBS for SVHN and CIFAR: three convolutions, three dense layers.

    Images are standardised; Xavier initialisation, normal for convolutions, uniform for dense.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, scaled: _Scaled, rngs: nnx.Rngs
    ):
        height, width, channels = input_shape
        conv = partial(nnx.Conv, kernel_init=xavier_normal, rngs=rngs)
        dense = partial(nnx.Linear, kernel_init=initializers.xavier_uniform(), rngs=rngs)
        self.conv1 = conv(channels, scaled(64), (5, 5), padding="VALID")
        self.conv2 = conv(scaled(64), scaled(96), (3, 3), padding="VALID")
        self.conv3 = conv(scaled(96), scaled(128), (3, 3))
        rows, columns = (math.ceil((math.ceil((size - 4) / 2) - 2) / 4) for size in (height, width))
        self.dense1 = dense(rows * columns * scaled(128), scaled(512))
        self.dense2 = dense(scaled(512), scaled(256))
        self.dense3 = dense(scaled(256), num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = standardize(images)
        x = _max_pool_3(nnx.relu(self.conv1(x)))
        x = _max_pool_3(nnx.relu(self.conv2(x)))
        x = _max_pool_3(nnx.relu(self.conv3(x)))
        x = x.reshape(len(x), -1)
        x = nnx.relu(self.dense1(x))
        x = nnx.relu(self.dense2(x))
        return self.dense3(x)


class DigitsMlp(nnx.Module):
    """Two tanh layers of 48 and 24 units for the digits of scikit-learn, whose pixels are 0..16."""

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, scaled: _Scaled, rngs: nnx.Rngs
    ):
        dense = partial(nnx.Linear, kernel_init=initializers.xavier_uniform(), rngs=rngs)
        self.dense1 = dense(math.prod(input_shape), scaled(48))
        self.dense2 = dense(scaled(48), scaled(24))
        self.dense3 = dense(scaled(24), num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = images.reshape(len(images), -1).astype(jnp.float32) / 16
        x = nnx.tanh(self.dense1(x))
        x = nnx.tanh(self.dense2(x))
        return self.dense3(x)


class SmallCnn(nnx.Module):
    """A small net for images of any size and range: two convolutions, one dense layer."""

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, scaled: _Scaled, rngs: nnx.Rngs
    ):
        height, width, channels = input_shape
        conv = partial(nnx.Conv, kernel_size=(3, 3), kernel_init=xavier_normal, rngs=rngs)
        self.conv1 = conv(channels, scaled(8))
        self.conv2 = conv(scaled(8), scaled(16))
        features = math.ceil(height / 4) * math.ceil(width / 4) * scaled(16)
        self.dense = nnx.Linear(
            features, num_classes, kernel_init=initializers.xavier_uniform(), rngs=rngs
        )

    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = standardize(images)
        x = _max_pool_2(nnx.relu(self.conv1(x)))
        x = _max_pool_2(nnx.relu(self.conv2(x)))
        return self.dense(x.reshape(len(x), -1))


class Decoder(nnx.Module):
    """A decoder for bytes: 6 layers of 256 features, 4 heads; 4.8 million parameters at width 1.

    Layers are normalised before (Xiong et al. 2020), places are learned, and the embedding of the
    bytes is that of the logits too.
    """

    def __init__(self, input_shape: tuple[int], num_classes: int, scaled: _Scaled, rngs: nnx.Rngs):
        heads, layers = 4, 6
        features = heads * scaled(64)
        embed = partial(nnx.Embed, features=features, rngs=rngs)
        self.bytes = embed(num_classes, embedding_init=initializers.normal(0.02))
        self.places = embed(input_shape[0], embedding_init=initializers.normal(0.02))
        self.layers = nnx.List(DecoderLayer(features, heads, layers, rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, sequences: Array) -> Array:
        """Logits (n, length, num_classes) of what follows each byte of sequences (n, length)."""
        x = (
            self.bytes(sequences.astype(jnp.int32))
            + self.places(jnp.arange(sequences.shape[1]))[None]
        )
        for layer in self.layers:
            x = layer(x)
        logits: Array = self.bytes.attend(self.norm(x))
        return logits


class DecoderLayer(nnx.Module):
    """Causal attention and a perceptron of four times the features, each added to its input."""

    def __init__(self, features: int, heads: int, layers: int, rngs: nnx.Rngs):
        def dense(inputs: int, outputs: int, stddev: float = 0.02) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, kernel_init=initializers.normal(stddev), rngs=rngs)

        self.heads = heads
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)
        # What is added up over layers starts smaller the more there are (Radford et al. 2019).
        added = 0.02 / math.sqrt(2 * layers)
        self.queries_keys_values = dense(features, 3 * features)
        self.out = dense(features, features, added)
        self.up = dense(features, 4 * features)
        self.down = dense(4 * features, features, added)

    def __call__(self, x: Array) -> Array:
        """The layer's outputs, (n, length, features) as x."""
        n, length, features = x.shape
        joint = self.queries_keys_values(self.norm1(x))
        shape = (n, length, 3, self.heads, features // self.heads)
        queries, keys, values = jnp.moveaxis(joint.reshape(shape), 2, 0)
        attended = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


def central_crop(images: Array, size: int) -> Array:
    """The central size x size pixels of (n, height, width, channels) images."""
    _, height, width, _ = images.shape
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, top : top + size, left : left + size, :]


def standardize(images: Array) -> Array:
    """Images of zero mean and unit variance each, as `tf.image.per_image_standardization`.

    The standard deviation is taken to be at least that of one pixel of value one: a constant image
    becomes zero.
    """
    images = images.astype(jnp.float32)
    axes = (1, 2, 3)
    mean = images.mean(axes, keepdims=True)
    smallest = 1 / math.sqrt(math.prod(images.shape[1:]))
    return (images - mean) / jnp.maximum(images.std(axes, keepdims=True), smallest)


# With the smallest height and width of images each can take; 0 is of sequences.
_NETS: dict[str, tuple[Callable[..., nnx.Module], int]] = {
    "mnist_2c2d": (Mnist2c2d, 1),
    "cifar10_2c3d": (Cifar2c3d, Cifar2c3d.crop),
    "3c3d": (Net3c3d, 9),
    "digits_mlp": (DigitsMlp, 1),
    "small_cnn": (SmallCnn, 1),
    "decoder": (Decoder, 0),
}
NAMES = tuple(_NETS)
