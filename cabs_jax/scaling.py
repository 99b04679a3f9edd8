"""What follows the batch size: the length of the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cabs_jax._arguments import check_batch_size, check_number
from cabs_jax.statistics import GradientMoments, PyTree
from cabs_jax.step_moments import check_moments, read_count


def scale_with_batch_size(
    power: ArrayLike = 0.5, reference: int = 256
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by (m/reference)^power, m being the number of examples of this step.

    Put it last in a chain, where it scales the learning rate. Common powers are 0.5 (square root
    scaling, for Adam) and 1 (linear scaling, for gradient descent), where a larger batch is to take
    larger steps, and −0.5 beside `rules.seesaw`. `update` needs `moments` or `count`.

    Args:
      power: Exponent; 0 leaves the updates as they are.
      reference: Number of examples for which the learning rate was chosen, in [1, 2**31 − 1].

    Returns:
      An optax transformation without a state.

    Raises:
      ValueError: If an argument is not finite or out of range; from `update`, if it is given
        neither `moments` nor `count`.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), scale_with_batch_size(0.5, reference=256))
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params, count=1024)
      >>> print(updates)
      [-0.2 -0.2]

    References:
      Malladi, Lyu, Panigrahi and Arora, [On the SDEs and Scaling Rules for Adaptive Gradient
      Algorithms](https://arxiv.org/abs/2205.10287), 2022, for the square root.
    """
    check_number("power", power, "a finite number", lambda _: True)
    expected = check_batch_size("reference", reference)

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree = None,
        *,
        moments: GradientMoments | None = None,
        count: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        if moments is not None:
            check_moments(moments, count=count)
            count = moments.count
        if count is None:
            raise ValueError(
                "scale_with_batch_size scales by the number of examples: pass moments= or count= "
                "to update, got count=None."
            )
        # An empty batch makes no step, so that its factor does not matter but must be finite.
        size = jnp.maximum(read_count(count), 1).astype(jnp.float32)
        factor = (size / jnp.asarray(expected, jnp.float32)) ** jnp.asarray(power, jnp.float32)
        return jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
