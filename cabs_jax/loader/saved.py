"""The sizes and states that a loader is given, checked."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import numpy as np

from cabs_jax._arguments import check_non_negative

MAX_BATCH_SIZE = 2**24  # larger ones are accidents, and would exhaust memory before any error
POSITIONS = 2**63  # in the stream; no state holds a larger one


def check_size(value: SupportsIndex | jax.Array) -> int:
    """Returns a batch size as an int.

    Raises:
      TypeError: If it is no whole number.
      ValueError: If it is not in [1, MAX_BATCH_SIZE].
    """
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"batch_size must be an integer, got {value!r}.") from error
    if isinstance(value, bool) or not 1 <= size <= MAX_BATCH_SIZE:
        raise ValueError(f"batch_size must be in [1, {MAX_BATCH_SIZE}], got {value!r}.")
    return size


def saved_sizes(size: int | jax.Array, earlier_sizes: tuple[Any, ...], lag: int) -> dict[str, Any]:
    """The part of a state that holds sizes, without those that no batch can have."""
    valid = {
        "batch_size": [int(size)],
        "batch_sizes": [int(earlier) for earlier in earlier_sizes],
    }
    valid = {key: [n for n in sizes if 1 <= n <= MAX_BATCH_SIZE] for key, sizes in valid.items()}
    current = {"batch_size": valid["batch_size"][0]} if valid["batch_size"] else {}
    return current | ({"batch_sizes": valid["batch_sizes"]} if lag else {})


def check_state(
    state: Any, identity: Mapping[str, Any], counts: tuple[str, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """Checks a state, and returns its size, if it holds one, and the sizes still to take effect.

    Args:
      state: What `get_state` returned, or anything else.
      identity: What it must hold, and be equal to.
      counts: What else it must hold, whole numbers that are not negative.

    Raises:
      TypeError: If it is no mapping, or holds something else than numbers where they belong.
      ValueError: If it is incomplete, belongs to another stream of examples, or holds a position
        or a size that no loader can have.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict that get_state returned, got {state!r}.")
    if missing := {*identity, *counts} - state.keys():
        raise ValueError(f"state lacks {sorted(missing)}, got {dict(state)}.")
    for key, own in identity.items():
        saved = state[key]
        if isinstance(saved, list | tuple) or np.ndim(saved) or saved != own:
            raise ValueError(
                f"state was saved with {key}={saved}, this loader has {key}={own}: "
                "the order of examples would differ."
            )
    for key in counts:
        if check_non_negative(key, state[key]) >= POSITIONS:
            raise ValueError(f"{key} must be below 2**63, got {state[key]}.")
    sizes = state.get("batch_sizes", ())
    if not isinstance(sizes, list | tuple | np.ndarray) or np.ndim(sizes) != 1:
        raise TypeError(f"batch_sizes must be a list of batch sizes, got {sizes!r}.")
    size = check_size(state["batch_size"]) if "batch_size" in state else None
    return size, tuple(map(check_size, sizes))
