"""Training without the host: many steps in one dispatch, the batch size adapting inside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from cabs_jax._arguments import check_non_negative, is_traced
from cabs_jax.loader.device_order import Position, advanced, indices
from cabs_jax.merging import merge_moments
from cabs_jax.moments import gradient_moments
from cabs_jax.moments.per_example import batch_size_of
from cabs_jax.moments.randomness import check_rng, keys_of_examples
from cabs_jax.moments.weighting import check_weights
from cabs_jax.state import adapt_state
from cabs_jax.statistics import GradientMoments, PyTree, Variance, WeightSums, tree_sum

BLOCKS_AHEAD = 64  # blocks whose order is computed at a time


class StepMetrics(NamedTuple):
    """What each step measured on its batch; entries beyond the last step made are 0.

    Attributes:
      batch_size: Number of examples, whatever their weights, int32 (max_steps,).
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
    """What one block of examples hands to the next.

    Attributes:
      number: Steps made so far, int32 scalar.
      examples: Examples seen so far, int32 scalar.
      params: The parameters.
      opt_state: The state of the optimizer.
      position: Of the next example.
      read: Examples of the batch under way read so far, int32 scalar; 0 between two batches.
      real: How many of these have a weight other than 0, int32 scalar.
      batch: Moments of these, the mean gradient in float32.
      metrics: One entry a step.
    """

    number: jax.Array
    examples: jax.Array
    params: PyTree
    opt_state: PyTree
    position: Position
    read: jax.Array
    real: jax.Array
    batch: GradientMoments
    metrics: StepMetrics


def on_device_loop(
    loss_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    variance: Variance = "trace",
    averaged_params: Callable[[PyTree], PyTree] | None = None,
    microbatch_size: int = 64,
    max_steps: int = 1000,
    seed: int | jax.Array = 0,
    shuffle: bool = True,
) -> Callable[..., OnDeviceResult]:
    """Many training steps as one function, for data that fit in device memory.

    A small net's step takes less time than the host needs to cut a batch and start the next step.
    Here all steps are one `lax.while_loop`, compiled once: the order of the examples is computed on
    the device, bit for bit that of `BatchLoader` with the same seed, and every step draws as many
    as the optimizer's state asks for. The loop goes over blocks of `microbatch_size` examples, and
    a step is made after the block that completes a batch. Sizes, losses and parameters are those of
    the host's loop, up to the rounding of sums.

    Many runs are one, too: wrapped in `jax.vmap` over learning rates, seeds or whatever else the
    optimizer or `params` are made from, every run works on its own block at its own batch, so that
    none waits for larger batches of another.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar loss` of one example; `loss_fn(params, example,
        rng)` where the loop is given `rng`.
      optimizer: Optimizer whose state holds a batch size, such as `cabs`. Its `update` is given
        `moments=` and, for other transformations in a chain, `value=`.
      variance: What the optimizer asks for: "diagonal" for `cabs_adam`, else "trace".
      averaged_params: From the optimizer's state to averaged parameters that it keeps, whose loss
        `cabs(optimal_value="estimated")` tells noise by; None where there are none.
      microbatch_size: Examples computed at a time. A step costs as much as the next multiple, so
        that small batches ask for a small one, and large batches for a large one.
      max_steps: Number of steps that the metrics have room for.
      seed: Identifies the order; where it is traced, it must lie below 2**32.
      shuffle: False gives the data's own order in every epoch.

    Returns:
      A pure function `(params, opt_state, data, position, num_steps=None, num_examples=None, *,
      rng=None, weights=None) -> OnDeviceResult`, to be compiled with `jax.jit`. The leaves of
      `data` have shape (length, ...); `position` is that of the first example, `Position()` at the
      start. The loop ends after `num_steps` steps, or with the step by which `num_examples`
      examples are seen, whichever comes first. Both may be traced; there are never more than
      `max_steps` steps.

      `rng` and `weights` are those of `gradient_moments`. Step n of the optimizer's state, counted
      from 0, has the key `jax.random.fold_in(rng, n)`: pieces of a run are given the same `rng`,
      and draw what the whole would. The weights, shape (length,), belong to the examples of `data`.

    Raises:
      TypeError: If `seed` is no integer; when called, if `rng` is no key, or only one of the loss
        and the call has it, or if weights are no numbers.
      ValueError: If a number is not positive, or `seed` is negative; when called, if the data's
        leaves or the weights differ in length or hold no examples, the optimizer's state holds no
        batch size, `num_steps` exceeds `max_steps`, or neither `num_steps` nor `num_examples` is
        given.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return (params["w"] @ example["x"] - example["y"]) ** 2
      >>> inputs = jax.random.normal(jax.random.key(0), (1000, 3))
      >>> data = {"x": inputs, "y": inputs @ jnp.array([1.0, -2.0, 3.0])}
      >>> tx = cabs_jax.cabs(0.1, min_batch_size=4, max_batch_size=64)
      >>> loop = jax.jit(cabs_jax.on_device_loop(loss_fn, tx, microbatch_size=16, max_steps=50))
      >>> params = {"w": jnp.zeros(3)}
      >>> result = loop(params, tx.init(params), data, cabs_jax.Position(), 50)
      >>> bool(result.metrics.value[-1] < 0.01)
      True
      >>> result = loop(*result[:2], data, result.position, 50)  # and on, without compiling again

      Six runs at once, over learning rates and seeds:

      >>> @jax.jit
      ... @jax.vmap
      ... def final_value(learning_rate, seed):
      ...     tx = cabs_jax.cabs(learning_rate, min_batch_size=4, max_batch_size=64)
      ...     loop = cabs_jax.on_device_loop(loss_fn, tx, microbatch_size=16, seed=seed)
      ...     result = loop(params, tx.init(params), data, cabs_jax.Position(), num_examples=2000)
      ...     return jnp.mean(jax.vmap(loss_fn, (None, 0))(result.params, data))
      >>> rates, seeds = jnp.repeat(jnp.array([0.05, 0.1, 0.2]), 2), jnp.tile(jnp.arange(2), 3)
      >>> bool(jnp.all(final_value(rates, seeds) < 1e-3))
      True
    """
    for name, number in (("microbatch_size", microbatch_size), ("max_steps", max_steps)):
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}.")
    if not is_traced(seed):
        seed = check_non_negative("seed", seed)
    rows, window = microbatch_size, BLOCKS_AHEAD * microbatch_size

    def loop(
        params: PyTree,
        opt_state: PyTree,
        data: PyTree,
        position: Position,
        num_steps: Any = None,
        num_examples: Any = None,
        *,
        rng: jax.Array | None = None,
        weights: ArrayLike | None = None,
    ) -> OnDeviceResult:
        length = batch_size_of(data)
        check_rng(rng, loss_fn)
        check_weights(weights, length)
        if num_steps is None and num_examples is None:
            raise ValueError("give num_steps, num_examples or both, got neither.")
        if num_steps is not None and not is_traced(num_steps) and num_steps > max_steps:
            raise ValueError(f"num_steps={num_steps} exceeds max_steps={max_steps}.")

        def loss_at(params: PyTree, drawn: tuple[jax.Array, ...]) -> jax.Array:
            # Gathered inside the block, so that padding is not.
            index, *key = drawn
            example = jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), data)
            return loss_fn(params, example, *key)

        moments_of = gradient_moments(loss_at, variance=variance)

        def goes_on(at: _Progress) -> jax.Array:
            more = at.number < last_step
            if num_examples is not None:
                more &= at.examples < num_examples
            return more | (at.read > 0)  # a batch begun is finished

        def with_order(at: _Progress) -> _Progress:
            """Goes on for as long as one computed stretch of the order lasts."""
            order = indices(at.position, window, length, seed, shuffle)
            start = at.examples

            def lasts(at: _Progress) -> jax.Array:
                return goes_on(at) & (at.examples - start <= window - rows)

            def block(at: _Progress) -> _Progress:
                return of_block(at, lax.dynamic_slice(order, (at.examples - start,), (rows,)))

            reached: _Progress = lax.while_loop(lasts, block, at)
            return reached

        def in_float32(moments: GradientMoments) -> GradientMoments:
            mean = jax.tree.map(lambda g: g.astype(jnp.float32), moments.mean)
            return moments._replace(mean=mean)

        def of_block(at: _Progress, places: jax.Array) -> _Progress:
            state = adapt_state(at.opt_state)
            count = jnp.minimum(state.batch_size - at.read, rows)
            real = jnp.arange(rows, dtype=jnp.int32) < count
            block_weights = None
            if weights is not None:
                block_weights = jnp.take(jnp.asarray(weights), places)
                real &= block_weights != 0
            drawn: tuple[jax.Array, ...] = (places,)
            if rng is not None:
                of_step = jax.random.fold_in(rng, state.step)
                drawn = places, keys_of_examples(of_step, real, (), before=at.real)
            moments = moments_of(
                at.params,
                drawn,
                real,
                weights=block_weights,
                averaged_params=averaged_params and averaged_params(at.opt_state),
            )
            reached = at._replace(
                examples=at.examples + count,
                position=advanced(at.position, count, length),
                read=at.read + count,
                real=at.real + jnp.sum(real, dtype=jnp.int32),
                batch=lax.cond(
                    at.read == 0,
                    lambda before, block: in_float32(block),
                    merge_moments,
                    at.batch,
                    moments,
                ),
            )
            incomplete = reached.read < state.batch_size
            after: _Progress = lax.cond(incomplete, lambda reached: reached, step, reached)
            return after

        def step(at: _Progress) -> _Progress:
            mean = jax.tree.map(lambda g, p: g.astype(p.dtype), at.batch.mean, at.params)
            moments = at.batch._replace(mean=mean)
            updates, opt_state = optimizer.update(
                mean, at.opt_state, at.params, value=moments.value, moments=moments
            )
            measured = StepMetrics(at.read, moments.value, tree_sum(moments.variance))
            return at._replace(
                number=at.number + 1,
                params=optax.apply_updates(at.params, updates),
                opt_state=opt_state,
                read=zero,
                real=zero,
                metrics=jax.tree.map(
                    lambda all_, x: all_.at[at.number].set(x), at.metrics, measured
                ),
            )

        last_step = max_steps if num_steps is None else jnp.minimum(num_steps, max_steps)
        nothing = jnp.zeros(max_steps, jnp.float32)
        zero = jnp.zeros((), jnp.int32)
        end: _Progress = lax.while_loop(
            goes_on,
            with_order,
            _Progress(
                number=zero,
                examples=zero,
                params=params,
                opt_state=opt_state,
                position=Position(*(jnp.asarray(part, jnp.int32) for part in position)),
                read=zero,
                real=zero,
                batch=_of_no_example(
                    params, variance, averaged_params is not None, weights is not None
                ),
                metrics=StepMetrics(nothing.astype(jnp.int32), nothing, nothing),
            ),
        )
        return OnDeviceResult(end.params, end.opt_state, end.position, end.metrics)

    return loop


def _of_no_example(
    params: PyTree, variance: Variance, averaged: bool, weighted: bool
) -> GradientMoments:
    zero = jnp.zeros((), jnp.float32)
    mean = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
    return GradientMoments(
        value=zero,
        mean=mean,
        variance=zero if variance == "trace" else mean,
        count=jnp.zeros((), jnp.int32),
        averaged_value=zero if averaged else None,
        weights=WeightSums(zero, zero, mean) if weighted else None,
    )
