"""The values that a sorted loss is evaluated with, and the slots that travel with them.

A *slot* is an argument that is added to the loss, filled with zeros, and never changes its value.
We only want its derivative. There are two kinds:

* Slots for gradients. Every example i is given its own copy w + s_i of a parameter, with s_i = 0;
  then ∂ℓ/∂s_i is by definition the gradient g_i of that example.
* Slots for statistics of gradients, such as ‖g_i‖². The forward pass ignores them; the derivative
  rule of a site, which we write (`site_vjps`), returns the statistic in the place where the
  derivative with respect to the slot belongs. JAX carries it back to the caller like any other
  cotangent. Cotangents of one argument add up: a slot that is given to several sites returns the
  sum of what they put in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cabs_jax.moments import jaxprs, sharding, shards
from cabs_jax.moments.factored.choice import Choice
from cabs_jax.moments.factored.sorted_loss import Program
from cabs_jax.moments.target import Target
from cabs_jax.statistics import Variance


class Shared(NamedTuple):
    """A value that is the same for all examples.

    Attributes:
      value: The value; a device's own part of it where there is a layout.
      gradient_slots: Slots for its per-example gradients, float32, shape (m, *value.shape), or
        None.
      square_slots: Slots for the sum of their squares, float32, shaped like the value, or None.
      again_slots: Slots for their sum weighted once more (see `Context`), float32, shaped like the
        value, or None.
      scale: What entries of parameters are multiplied by in entries of the value, up to the sign:
        a float32 array of its shape, or a scalar, or None for 1.
      layout: How the value, and with it the slots for sums, lies on the devices; None where each
        holds the whole.
    """

    value: Any
    gradient_slots: Any = None
    square_slots: Any = None
    again_slots: Any = None
    scale: Any = None
    layout: shards.Layout | None = None


class Batched(NamedTuple):
    """A value with a leading axis of examples."""

    value: Any


Value = Shared | Batched


class Sample(NamedTuple):
    """The examples of a batch, and where they are.

    Attributes:
      examples: Size m of the batch.
      axis_names: Mesh axes over which the batch varies, inside a shard_map.
      target: The machine, and how the batch lies on it.
    """

    examples: int
    axis_names: tuple[str, ...]
    target: Target

    def zeros(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """An empty slot."""
        slot: jax.Array = sharding.vary(jnp.zeros(shape, dtype), self.axis_names)
        return slot


class Context(NamedTuple):
    """What the evaluation of a batch needs to know.

    Attributes:
      program: The sorted loss.
      choices: How each parameter is measured; () where nothing is.
      variance: "trace", "by_parameter" or "diagonal".
      sample: The examples.
      norms: Slots for squared norms, shape (m,), by parameter.
      factors: Slots for factors, by the number of the site.
      shares: Weights for a second sum of the gradients, float32, shape (m,), or None.
    """

    program: Program
    choices: tuple[Choice, ...]
    variance: Variance
    sample: Sample
    norms: dict[int, jax.Array]
    factors: dict[int, tuple[jax.Array, jax.Array]]
    shares: jax.Array | None = None


def slot_dtype(dtype: Any) -> Any:
    """The dtype of a slot for gradients of a value: float32, or complex64 for a complex value."""
    return jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32


def whole(value: Value) -> Value:
    """Gathers a value of which every device holds a part."""
    if isinstance(value, Batched) or value.layout is None:
        return value
    value = whole_slots(value)
    return value._replace(value=shards.gathered(value.layout, value.value), layout=None)


def whole_slots(value: Shared) -> Shared:
    """Makes slots of a whole value of those of its parts, which hold zeros."""
    if value.layout is None:
        return value
    exact = value.layout.exact()
    squares, again = (
        None if slots is None else shards.gathered(exact, slots)
        for slots in (value.square_slots, value.again_slots)
    )
    return value._replace(square_slots=squares, again_slots=again)


def to_batched(sample: Sample, value: Value) -> Batched:
    """Gives every example a copy of its own of a shared value."""
    value = whole(value)
    if isinstance(value, Batched):
        return value
    copies = jnp.broadcast_to(value.value, (sample.examples, *jnp.shape(value.value)))
    copies = sharding.vary(copies, sample.axis_names)
    if value.gradient_slots is not None:
        # The derivative by the slot of example i is the gradient of example i.
        copies = copies + value.gradient_slots.astype(copies.dtype)
    return Batched(copies)


def evaluate_batched(
    sample: Sample, equation: jaxprs.Equation, values: list[Value]
) -> list[Batched]:
    """Evaluates an equation for every example, without regard to slots."""
    in_axes = [0 if isinstance(v, Batched) else None for v in values]
    arrays = [v.value for v in values]
    outputs = sample.target.vmap(lambda *xs: jaxprs.evaluate(equation, xs), in_axes)(*arrays)
    return [Batched(output) for output in outputs]
