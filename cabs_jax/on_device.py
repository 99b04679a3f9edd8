"""Training without the host: many steps in one dispatch, the batch size adapting inside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cabs_jax._arguments import check_non_negative, is_traced
from cabs_jax.loader.device_order import Position, advanced, indices
from cabs_jax.moments import gradient_moments
from cabs_jax.moments.per_example import batch_size_of
from cabs_jax.state import batch_size
from cabs_jax.statistics import PyTree, Variance, tree_sum

BATCHES_AHEAD = 8  # largest batches whose order is computed at a time


class StepMetrics(NamedTuple):
    """What each step measured on its batch; entries beyond the last step made are 0.

    Attributes:
      batch_size: Number of examples, int32 (max_steps,).
      value: Mean loss, float32 (max_steps,).
      gradient_variance: Trace ξ of the gradient covariance, float32 (max_steps,).
    """

    batch_size: jax.Array
    value: jax.Array
    gradient_variance: jax.Array


class OnDeviceResult(NamedTuple):
    """Where training stands after the steps, and what they measured.

    Attributes:
      params: The parameters.
      opt_state: The state of the optimizer, with the next batch size.
      position: Of the next example.
      metrics: One entry a step.
    """

    params: PyTree
    opt_state: PyTree
    position: Position
    metrics: StepMetrics


class _Progress(NamedTuple):
    """What one step of the loop hands to the next.

    Attributes:
      number: Steps made so far, int32 scalar.
      params: The parameters.
      opt_state: The state of the optimizer.
      position: Of the next example.
      order: Indices of the examples of the current window, int32 (window,).
      used: Examples of the window that are used up, int32 scalar.
      metrics: One entry a step.
    """

    number: jax.Array
    params: PyTree
    opt_state: PyTree
    position: Position
    order: jax.Array
    used: jax.Array
    metrics: StepMetrics


def on_device_loop(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    variance: Variance = "trace",
    max_batch_size: int = 2048,
    microbatch_size: int = 64,
    max_steps: int = 1000,
    seed: int = 0,
    shuffle: bool = True,
) -> Callable[..., OnDeviceResult]:
    """Many training steps as one function, for data that fit in device memory.

    A small net's step takes less time than the host needs to cut a batch and start the next step.
    Here all steps are one `lax.while_loop`, compiled once: the order of the examples is computed on
    the device, bit for bit that of `BatchLoader` with the same seed, and every step draws as many
    as the optimizer's state asks for. The batch is worked through in blocks of `microbatch_size`,
    of which only the occupied ones are gathered and computed (in a process of several devices more
    of them are: see `gradient_moments`). Sizes, losses and parameters are
    those of the host's loop, up to the rounding of sums.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar loss` of one example.
      optimizer: Optimizer whose state holds a batch size, such as `cabs`.
      variance: What the optimizer asks for: "diagonal" for `cabs_adam`, else "trace".
      max_batch_size: Largest batch, which should be the optimizer's own; larger ones are cut to it,
        rounded up to a multiple of `microbatch_size`.
      microbatch_size: Examples computed at a time. A step costs as much as the next multiple, so
        that small batches ask for a small one, and large batches for a large one.
      max_steps: Number of steps that the metrics have room for.
      seed: Identifies the order.
      shuffle: False gives the data's own order in every epoch.

    Returns:
      A pure function `(params, opt_state, data, position, num_steps) -> OnDeviceResult`, to be
      compiled with `jax.jit`. The leaves of `data` have shape (length, ...); `position` is that of
      the first example, `Position()` at the start; `num_steps`, at most `max_steps`, may be traced
      (then more are cut to it).

    Raises:
      TypeError: If `seed` is no integer.
      ValueError: If a number is not positive, or `seed` is negative; when called, if the data's
        leaves differ in length or hold no examples, the optimizer's state holds no batch size, or
        `num_steps` exceeds `max_steps`.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return (params["w"] @ example["x"] - example["y"]) ** 2
      >>> inputs = jax.random.normal(jax.random.key(0), (1000, 3))
      >>> data = {"x": inputs, "y": inputs @ jnp.array([1.0, -2.0, 3.0])}
      >>> tx = cabs_jax.cabs(0.1, min_batch_size=4, max_batch_size=64)
      >>> loop = jax.jit(cabs_jax.on_device_loop(
      ...     loss_fn, tx, max_batch_size=64, microbatch_size=16, max_steps=50))
      >>> params = {"w": jnp.zeros(3)}
      >>> result = loop(params, tx.init(params), data, cabs_jax.Position(), 50)
      >>> bool(result.metrics.value[-1] < 0.01)
      True
      >>> result = loop(*result[:2], data, result.position, 50)  # and on, without compiling again
    """
    for name, number in (
        ("max_batch_size", max_batch_size),
        ("microbatch_size", microbatch_size),
        ("max_steps", max_steps),
    ):
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}.")
    seed = check_non_negative("seed", seed)
    rows = -(-max_batch_size // microbatch_size) * microbatch_size
    window = BATCHES_AHEAD * rows

    def loop(
        params: PyTree, opt_state: PyTree, data: PyTree, position: Position, num_steps: Any
    ) -> OnDeviceResult:
        length = batch_size_of(data)
        if not is_traced(num_steps) and num_steps > max_steps:
            raise ValueError(f"num_steps={num_steps} exceeds max_steps={max_steps}.")

        def loss_at(params: PyTree, index: jax.Array) -> jax.Array:
            # Gathered inside the block, so that padding is not.
            example = jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), data)
            return loss_fn(params, example)

        moments_of = gradient_moments(loss_at, variance=variance, microbatch_size=microbatch_size)

        def order_from(position: Position) -> tuple[jax.Array, jax.Array]:
            return indices(position, window, length, seed, shuffle), jnp.zeros((), jnp.int32)

        def step(at: _Progress) -> _Progress:
            size = jnp.minimum(batch_size(at.opt_state), rows)
            order, used = lax.cond(
                at.used + rows > window, order_from, lambda _: (at.order, at.used), at.position
            )
            moments = moments_of(
                at.params,
                lax.dynamic_slice(order, (used,), (rows,)),
                jnp.arange(rows, dtype=jnp.int32) < size,
            )
            updates, opt_state = optimizer.update(
                moments.mean,
                at.opt_state,
                at.params,
                value=moments.value,
                gradient_variance=moments.variance,
                count=moments.count,
            )
            measured = StepMetrics(size, moments.value, tree_sum(moments.variance))
            return _Progress(
                number=at.number + 1,
                params=optax.apply_updates(at.params, updates),
                opt_state=opt_state,
                position=advanced(at.position, size, length),
                order=order,
                used=used + size,
                metrics=jax.tree.map(
                    lambda all_, x: all_.at[at.number].set(x), at.metrics, measured
                ),
            )

        start = Position(*(jnp.asarray(part, jnp.int32) for part in position))
        order, used = order_from(start)
        nothing = jnp.zeros(max_steps, jnp.float32)
        metrics = StepMetrics(nothing.astype(jnp.int32), nothing, nothing)
        zero = jnp.zeros((), jnp.int32)
        last = jnp.minimum(num_steps, max_steps)
        end: _Progress = lax.while_loop(
            lambda at: at.number < last,
            step,
            _Progress(zero, params, opt_state, start, order, used, metrics),
        )
        return OnDeviceResult(end.params, end.opt_state, end.position, end.metrics)

    return loop
