"""The gradient variance as the authors' code has it, which squares before it sums over positions.

A convolution's filter gradient is a sum over positions t of inputs times cotangents, Σ_t a_t δ_t,
whose square is what the variance is made of. The authors take Σ_t (a_t δ_t)², and so for its bias,
whose input is 1. For dense layers, which have one position, both are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cabs_jax.statistics import PyTree
from experiments.training import models


def squares_over_positions(
    name: str, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0
) -> Callable[[PyTree, Mapping[str, jax.Array]], jax.Array]:
    """`(params, batch) -> (1/m) Σ_i Σ_t ‖a_t δ_t‖²`, a float32 scalar, of a net of `models.build`.

    Less the squared norm of the mean gradient it is the authors' ξ.
    """
    model = models.build(name, input_shape, num_classes, width, call_layer=_squaring)

    def total_loss(params: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
        logits = model.predict(params, batch["input"])
        labels = batch["label"]
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def squares(params: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
        of_all: jax.Array = optax.tree.sum(jax.grad(total_loss)(params, batch))
        return of_all / len(batch["label"])

    return squares


def _squaring(layer: nnx.Module, inputs: jax.Array) -> jax.Array:
    """The layer, whose parameters' cotangents are sums of squares.

    It is linear in its parameters, so that pulling δ² back at the inputs a² gives Σ a² δ².
    """
    graph, state = nnx.split(layer)

    def apply(state: Any, inputs: jax.Array) -> jax.Array:
        outputs: jax.Array = nnx.merge(graph, state)(inputs)
        return outputs

    def backward(saved: tuple[Any, jax.Array], cotangent: jax.Array) -> tuple[Any, jax.Array]:
        state, inputs = saved
        _, of_inputs = jax.vjp(apply, state, inputs)[1](cotangent)
        squares, _ = jax.vjp(apply, state, inputs**2)[1](cotangent**2)
        return squares, of_inputs

    called = jax.custom_vjp(apply)
    called.defvjp(lambda state, inputs: (apply(state, inputs), (state, inputs)), backward)
    return called(state, inputs)
