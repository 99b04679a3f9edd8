"""A key for every example, made of one for the batch.

The real examples are counted through the whole batch, over all its shards, and number i is given
`jax.random.fold_in(rng, i)`. So the draws of an example depend on neither padding nor on how the
batch is split over devices and blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from cabs_jax.statistics import PyTree

Result = TypeVar("Result")


def check_rng(rng: Any, loss_fn: Callable[..., Any]) -> None:
    """Raises unless `rng` is one key and the loss takes it, or there is none and it takes none.

    Raises:
      TypeError: If the loss and the call disagree, or `rng` is no key.
      ValueError: If `rng` is several keys.
    """
    if rng is None:
        if not _takes(loss_fn, 2) and _takes(loss_fn, 3):
            raise TypeError(
                "loss_fn takes three arguments, and was given (params, example): pass one key as"
                " rng= if the third is for random numbers, and make one tuple of an example of"
                " several arrays."
            )
        return
    if not _takes(loss_fn, 3):
        raise TypeError(
            "rng was given, but loss_fn takes no third argument: make it loss_fn(params, example,"
            " rng), or leave rng= out."
        )
    dtype = getattr(rng, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        found = type(rng).__name__ if dtype is None else dtype
        raise TypeError(f"rng must be one key, as jax.random.key(0) is, got {found}.")
    if jnp.ndim(rng) != (0 if typed else 1):
        raise ValueError(
            f"rng must be one key, of which one is made for each example, got shape {rng.shape}."
        )


def with_key(loss_fn: Callable[..., Result]) -> Callable[[PyTree, tuple[PyTree, Any]], Result]:
    """A loss of (params, example, rng) as one of (params, (example, rng))."""
    return lambda params, example: loss_fn(params, *example)


def keys_of_examples(
    rng: jax.Array, keep: jax.Array, axis_names: tuple[str, ...], before: int | jax.Array = 0
) -> jax.Array:
    """One key for each example of this shard.

    Args:
      rng: One key, typed or raw.
      keep: Boolean, shape (m,), False for padding.
      axis_names: Mesh axes that split the batch, inside a shard_map.
      before: Number of real examples of the batch before these, int32 scalar.

    Returns:
      Keys of shape (m,), or (m, 2) where they are raw.
    """
    number = before + jnp.cumsum(keep, dtype=jnp.int32) - 1
    if axis_names:
        real = lax.all_gather(jnp.sum(keep, dtype=jnp.int32), axis_names)  # by shard
        earlier = jnp.arange(real.size) < lax.axis_index(axis_names)
        number = number + jnp.sum(jnp.where(earlier, real, 0))
    keys: jax.Array = jax.vmap(jax.random.fold_in, (None, 0))(rng, number)
    return keys


def _takes(loss_fn: Callable[..., Any], arguments: int) -> bool:
    """Whether a function can be called with so many positional arguments, as far as it says."""
    try:
        signature = inspect.signature(loss_fn)
    except ValueError:  # some builtins have none
        return True
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True
