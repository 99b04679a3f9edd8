"""How a batch is split, and whether the options agree with it and with each other."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from cabs_jax.statistics import PyTree, Variance

Method = Literal["auto", "factored", "per_example", "between"]
_ONE_BATCH = "Inputs and targets are one batch: pass (params, (x, y)), not (params, x, y)."


def block_size(
    size: int,
    method: Method,
    microbatch_size: int | None,
    groups: int | None,
    axis_names: tuple[str, ...],
    examples_per_loss: int | None = None,
) -> int:
    """Returns how many examples are worked on at a time.

    Raises:
      ValueError: If the batch does not split so.
    """
    if method == "between":
        if examples_per_loss is not None:
            if size % examples_per_loss:
                raise ValueError(
                    f"examples_per_loss={examples_per_loss} does not divide the batch (or shard) of"
                    f" {size}: keep to its multiples, as round_to={examples_per_loss} does."
                )
            groups = size // examples_per_loss
        shards = math.prod(lax.axis_size(axis) for axis in axis_names)
        parts = groups or 1
        if parts * shards < 2:
            raise ValueError(
                f'method="between" compares groups, and here there is {parts * shards}: pass'
                " groups=2 or more (with examples_per_loss=, a batch of as many), or split the"
                " batch over a mesh (mesh= or axis_name=)."
            )
        if size % parts:
            raise ValueError(f"groups={parts} does not divide the batch (or shard) of {size}.")
        return size // parts
    if microbatch_size is not None and size % microbatch_size:
        raise ValueError(
            f"microbatch_size={microbatch_size} does not divide the batch (or shard) of {size}; pad"
            " the batch and pass a mask."
        )
    return microbatch_size or size


def check_options(
    method: Method, variance: Variance, microbatch_size: int | None, groups: int | None
) -> None:
    """Raises ValueError for options that are unknown or contradict each other."""
    for name, value, known in (
        ("method", method, get_args(Method)),
        ("variance", variance, get_args(Variance)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}.")
    for name, number in (("microbatch_size", microbatch_size), ("groups", groups)):
        if number is not None and not (isinstance(number, int) and number >= 1):
            raise ValueError(f"{name} must be a positive int or None, got {number!r}.")
    if groups is not None and method != "between":
        raise ValueError(f'groups={groups} goes with method="between", not with {method!r}.')
    if microbatch_size is not None and method == "between":
        raise ValueError(
            f'microbatch_size={microbatch_size} has no place in method="between", whose groups are'
            " worked on one at a time; use groups=."
        )


def check_coupling(
    examples_per_loss: int | None, method: Method, groups: int | None, keep_batch_dim: bool
) -> None:
    """Raises ValueError if options do not go with a loss that takes several examples."""
    if examples_per_loss is None:
        return
    if not (isinstance(examples_per_loss, int) and examples_per_loss >= 1):
        raise ValueError(
            f"examples_per_loss must be a positive int or None, got {examples_per_loss!r}."
        )
    if method != "between" or groups is not None or keep_batch_dim:
        raise ValueError(
            f'examples_per_loss={examples_per_loss} makes the groups of method="between", and'
            f" goes with neither method={method!r}, groups={groups} nor"
            f" keep_batch_dim={keep_batch_dim}."
        )


def check_coupled(examples_per_loss: int | None, **given: Any) -> None:
    """Raises ValueError if a call gives the single examples of a coupled loss something."""
    found = [name for name, value in given.items() if value is not None]
    if examples_per_loss is not None and found:
        raise ValueError(
            f"a loss of examples_per_loss={examples_per_loss} examples takes no {found[0]}, which"
            " is for single ones: pass batches of whole groups, and keys inside the batch."
        )


def check_mask(mask: ArrayLike | None, size: int) -> None:
    """Raises unless a mask is None or a boolean array of shape (size,)."""
    if mask is None:
        return
    found = getattr(mask, "dtype", type(mask).__name__)
    if found != jnp.bool_:
        raise TypeError(f"mask must be a boolean array, got {found}. {_ONE_BATCH}")
    if jnp.shape(mask) != (size,):
        raise ValueError(
            f"mask must have shape ({size},) like the batch, got {jnp.shape(mask)}. {_ONE_BATCH}"
        )


def fill_padding(batch: PyTree, keep: jax.Array) -> PyTree:
    """Overwrites padding with the first real example, so that it computes nothing unusual."""
    place = jnp.arange(keep.shape[0])
    first = place == jnp.min(jnp.where(keep, place, keep.shape[0]))

    def filled(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        shape = keep.shape + (1,) * (x.ndim - 1)
        picked = jnp.where(first.reshape(shape), x, jnp.zeros((), x.dtype))
        row = jnp.any(picked, 0) if x.dtype == jnp.bool_ else jnp.sum(picked, 0, dtype=x.dtype)
        return jnp.where(keep.reshape(shape), x, row[None])

    return jax.tree.map(filled, batch)
