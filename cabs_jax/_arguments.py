"""Checks of arguments. A value that is traced cannot be checked before the program runs."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cabs_jax.statistics import PyTree

INT32_MAX = 2**31 - 1


def is_traced(value: Any) -> bool:
    """Whether a value is known only once the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def check_number(
    name: str, value: ArrayLike, requirement: str, holds: Callable[[float], bool]
) -> None:
    """Raises unless a value is a finite scalar, in float32 too, that satisfies a requirement.

    Args:
      name: Name of the argument, for the message.
      value: The argument; of a traced one only the shape is checked.
      requirement: The requirement in words, read after "must be".
      holds: Whether a finite number satisfies it; asked of the number in float32, which is what is
        computed with.

    Raises:
      ValueError: With the value, if it does not.
    """
    message = f"{name} must be {requirement}, got {value!r}."
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        raise ValueError(message)
    if np.shape(value) != ():
        raise ValueError(f"{message} It has shape {np.shape(value)}; pass a scalar.")
    if is_traced(value):
        return
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    if not (math.isfinite(number) and holds(number)):
        rounded = (
            "" if number == float(value) or number != number else f" In float32 it is {number}."
        )
        raise ValueError(message + rounded)


def check_non_negative(name: str, value: Any) -> int:
    """Returns a whole number that is not negative as an int.

    Raises:
      TypeError: If it is no whole number.
      ValueError: If it is negative.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from error
    if number < 0:
        raise ValueError(f"{name} must be non-negative, got {number}.")
    return number


def check_parameters(params: PyTree) -> None:
    """Raises TypeError for complex parameters, whose gradient has no single covariance."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}: hold"
                " the real and imaginary parts of complex parameters as two real ones."
            )


def check_batch_size(name: str, value: Any) -> int | jax.Array:
    """Returns a batch size as an int, or as an int32 scalar if it is traced.

    Raises:
      ValueError: If it is not a whole number in [1, 2**31 − 1].
    """
    if is_traced(value):
        return jnp.asarray(value, jnp.int32)
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of examples, got {value!r}.") from None
    if not 1 <= size <= INT32_MAX:
        raise ValueError(f"{name} must lie in [1, 2**31 - 1], got {size}.")
    return size
