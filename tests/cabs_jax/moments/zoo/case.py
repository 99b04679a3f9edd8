"""Per-example losses of every kind, one function each.

`held` names the parameters whose gradients are held for every example: biases, scales and the like,
for which this costs next to nothing, and those that no rule covers. `unused` names those whose
gradient is zero. All arrays are float32 (or integers), so that a case can be cast to float64.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

EXAMPLES = 16
DIMENSIONS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


class Case(NamedTuple):
    """A loss with parameters and a batch, as numpy arrays."""

    loss: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    held: tuple[str, ...]
    unused: tuple[str, ...]
    tolerance: float


class Draw:
    """Random arrays."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def __call__(self, *shape, scale=1.0):
        """A parameter."""
        return (scale * self.random.normal(size=shape)).astype(np.float32)

    def batch(self, *shape):
        """Something of every example."""
        return self(EXAMPLES, *shape)

    def tokens(self, *shape, low=0, high=9):
        return self.random.integers(low, high, (EXAMPLES, *shape)).astype(np.int32)


ZOO: dict[str, Callable[[], Case]] = {}


def case(held="", unused="", tolerance=1e-4):
    """Enters `function(draw) -> (loss, params, batch)` into the zoo under its name."""

    def enter(function):
        @functools.cache
        def build():
            made = function(Draw(zlib.crc32(function.__name__.encode())))
            return Case(*made, tuple(held.split()), tuple(unused.split()), tolerance)

        ZOO[function.__name__] = build
        return function

    return enter


def squares(x):
    """A curved scalar, so that every cotangent depends on the example."""
    return jnp.sum(jnp.square(jnp.tanh(x)))


def convolution(x, w, strides=1, padding="SAME", **options):
    """A convolution of one example (*spatial, channels)."""
    rank = w.ndim - 2
    strides = (strides,) * rank if isinstance(strides, int) else strides
    options.setdefault("dimension_numbers", DIMENSIONS[rank])
    return lax.conv_general_dilated(x[None], w, strides, padding, **options)[0]


def add(x, b):
    """Adds a bias along the last axis without rank promotion."""
    return x + jnp.broadcast_to(b, x.shape)


def normalised(x, axes):
    mean, variance = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5)
