"""Complete optimizers: gradient descent, momentum and Adam, each coupled to its batch size."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cabs_jax import rules
from cabs_jax._arguments import check_number
from cabs_jax.learning_rates import ScalarOrSchedule, at_step, check_learning_rate
from cabs_jax.rounding import RoundTo
from cabs_jax.rules import OptimalValue
from cabs_jax.scaling import scale_by_adam
from cabs_jax.sizing import BeyondMax, Sizing, held, select, sizing, unless_empty
from cabs_jax.state import AdaptBatchSizeState, CoupledState
from cabs_jax.statistics import PyTree, Variance, measured, tree_sum
from cabs_jax.step_moments import read_moments
from cabs_jax.transform import transformation


def cabs(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ArrayLike | None = None,
    min_batch_size: ArrayLike = 16,
    max_batch_size: ArrayLike = 2048,
    decay: ArrayLike = 0.95,
    scale: ArrayLike = 1.0,
    eps: ArrayLike = 0.0,
    optimal_value: OptimalValue = 0.0,
    debias: bool = False,
    initial_batch_size: ArrayLike | None = None,
    round_to: RoundTo = 1,
    beyond_max: BeyondMax = "clip",
    axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent whose batch size is coupled to its learning rate (CABS).

    Steps by −α·ḡ and sets the next batch size to

        m = c·α·ξ / (F − F* + ε),    ξ = (1/m) Σ_i ‖g_i‖² − ‖ḡ‖²,    F = (1/m) Σ_i ℓ_i,

    ξ and F being smoothed by exponential running averages, m rounded half to even and clipped. It
    is `adapt_batch_size(rules.cabs(learning_rate, ...), ...)` followed by the scaling by −α; chain
    those two for anything beyond gradient descent with momentum.

    `update` may be called in two ways that give the same updates and batch sizes:

    * path (a), with per-example gradients, that is trees like the parameters with a leading
      example axis:

          gradients_of = jax.jit(cabs_jax.per_example_value_and_grad(loss_fn))
          losses, grads = gradients_of(params, batch)
          updates, state = tx.update(grads, state, params, value=losses, mask=None)

      `value` holds the losses, shape (m,), or their mean; `mask` is boolean, shape (m,), and False
      marks padding, which has no influence, whatever it holds.
    * path (b), with the mean gradient and its variance, which costs no memory per example:

          moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn))
          m = moments_of(params, batch, mask=None)
          updates, state = tx.update(
              m.mean, state, params, value=m.value, gradient_variance=m.variance, count=m.count)

      `gradient_variance` is the trace ξ, a scalar, or the diagonal of the covariance, a tree like
      the parameters. `count` is the number of real examples; where it is zero, the state and the
      parameters stay as they are. CABS does without it.

    With heavy-ball momentum β every gradient moves the parameters by α·ḡ/(1 − β) in the end, so
    that α/(1 − β) takes the place of α in the rule (α stays in the step). This takes the gradient
    to be about the same over 1/(1 − β) steps, and asks for α/(1 − β) ≈ 1/L.

    `params` is required on both; unknown extra arguments are ignored. The losses should be those
    whose gradients are given: a penalty that is not part of `value` belongs in
    `optax.add_decayed_weights`, after the gradients have been averaged.

    Hostile numbers: where F ≤ F* the size is the maximum; where ξ = 0 or α = 0, the minimum. A step
    whose loss or gradient is not finite changes neither averages nor batch size, and passes its
    update on for `optax.apply_if_finite` and its kin to judge (`adapt_batch_size` says how). One
    that is finite and absurd, a variance of 1e38, counts in its own step and is forgotten in the
    next (see `decay` of `adapt_batch_size`). A single example has no variance: from batches of 1
    CABS does not grow again, so keep `min_batch_size` above that.

    Args:
      learning_rate: Learning rate α ≥ 0: a float, a traced scalar, or an optax schedule. No
        decreasing schedule is needed, since a growing batch has the same effect; one that falls to
        less than half its peak draws a warning, as the size, being coupled to α, falls with it and
        leaves the noise as it was. To have both, couple the size to the peak:
        `chain(cabs(peak), optax.scale_by_schedule(factor))`, where factor is at most 1.
      momentum: β in [0, 1) of `optax.trace`, or None for plain gradient descent.
      min_batch_size: Smallest size, at least 1.
      max_batch_size: Largest size, at most 2**31 − 1.
      decay: Constant of the running averages, in [0, 1).
      scale: Factor c ≥ 0 on the batch size.
      eps: ε ≥ 0, added to the denominator.
      optimal_value: Lower bound F* on the loss, or "estimated" for F − F* from the progress of the
        loss itself, as `rules.cabs` describes; that needs `count` (or `moments`).
      debias: Whether the averages start at 0 and are divided by 1 − decay^n after n steps. If not,
        that of the loss starts at 1 and that of ξ at 0, as in the authors' code.
      initial_batch_size: Size of the first batch, within the bounds, rounded to a legal size; the
        smallest legal size by default.
      round_to: An int k for the nearest multiple of k, half to even; or an increasing tuple of
        legal sizes, for the nearest in ratio. The state always holds a legal size.
      beyond_max: What a size above `max_batch_size` becomes: "clip" takes the largest size and the
        full step; "scale_learning_rate" also multiplies α by `max_batch_size` over the size asked
        for, which leaves the noise floor α·ξ/(4m) where the rule wants it. The rule goes on with
        the nominal α. Where it asks for an infinite size, the last finite one counts.
      axis_name: Mapped axis over which path (a) is split, inside a `shard_map` of one's own.

    Returns:
      An optax optimizer. Its state is an `AdaptBatchSizeState`, with momentum a `CoupledState` that
      holds one as `adapt`. However it is wrapped, `batch_size(state)` is the size of the next batch
      and `info(state)` an `Info` of the last step, to be plotted.

    Raises:
      ValueError: If an argument is out of range, or if no legal size lies within the bounds. Values
        traced by JAX are not checked. `update` raises it for arguments that disagree in shape.

    References:
      Balles, Romero and Hennig, [Coupling Adaptive Batch Sizes with Learning
      Rates](https://arxiv.org/abs/1612.05086), 2017.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, example):
      ...     return (params["w"] @ example["x"] - example["y"]) ** 2
      >>> inputs = jax.random.normal(jax.random.key(0), (1000, 3))
      >>> data = {"x": inputs, "y": inputs @ jnp.array([1.0, -2.0, 3.0])}
      >>> moments_fn = jax.jit(cabs_jax.gradient_moments(loss_fn))
      >>> params, position = {"w": jnp.zeros(3)}, 0
      >>> tx = cabs_jax.cabs(learning_rate=0.1, min_batch_size=4, max_batch_size=64)
      >>> state = tx.init(params)
      >>> for _ in range(15):
      ...     size = int(cabs_jax.batch_size(state))
      ...     batch = jax.tree.map(lambda x: x[position:position + size], data)
      ...     position += size
      ...     m = moments_fn(params, batch)
      ...     updates, state = tx.update(
      ...         m.mean, state, params, value=m.value, gradient_variance=m.variance)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(4 <= cabs_jax.batch_size(state) <= 64 and state.info.value < 1.0)
      True
    """
    rate = learning_rate
    if momentum is not None:
        check_number("momentum", momentum, "None or in [0, 1)", lambda x: 0 <= x < 1)
        check_learning_rate(learning_rate)
        rate = _effective(learning_rate, momentum)
    rule = rules.cabs(rate, scale=scale, eps=eps, optimal_value=optimal_value)
    rule_to_size = sizing(
        rule,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        decay=decay,
        debias=debias,
        initial_batch_size=initial_batch_size,
        round_to=round_to,
        beyond_max=beyond_max,
    )
    if momentum is not None:
        return _coupled(rule_to_size, optax.trace(momentum), learning_rate, axis_name)
    adapt = transformation(rule_to_size, axis_name)

    def update(
        updates: PyTree, state: AdaptBatchSizeState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, AdaptBatchSizeState]:
        mean, new_state = adapt.update(updates, state, params, **extra_args)
        return _scaled(mean, _step_size(learning_rate, rule_to_size, state)), new_state

    return optax.GradientTransformationExtraArgs(adapt.init, update)


def cabs_adam(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    half_life: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    min_batch_size: ArrayLike = 16,
    max_batch_size: ArrayLike = 2048,
    decay: ArrayLike = 0.95,
    scale: ArrayLike = 1.0,
    optimal_value: OptimalValue = 0.0,
    debias: bool = False,
    initial_batch_size: ArrayLike | None = None,
    round_to: RoundTo = 1,
    beyond_max: BeyondMax = "clip",
    axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam, or AdamW, whose batch size is coupled to its step sizes.

    The updates are those of `optax.adam` (of `optax.adamw` with `weight_decay`). The next batch
    size is what CABS becomes for a step −A·ḡ with a diagonal matrix A:

        m = c·tr(A Σ̂) / (F − F*),    A = α / (√v̂ + eps),    Σ̂_jj = (1/m) Σ_i g_ij² − ḡ_j².

    Derivation. Where the Hessian H ⪯ A⁻¹, a step is expected to gain at least

        F(x) − E F(x − Aḡ) ≥ ½ ∇FᵀA∇F − tr(AΣ)/(2m).

    Per example, that is divided by m, this is largest at m = 2 tr(AΣ) / ∇FᵀA∇F; with
    ∇FᵀA∇F ≈ 2(F − F*), which is what H ≈ A⁻¹ gives near a minimum, m = tr(AΣ)/(F − F*). For A = α·1
    it is `cabs`. The assumptions are thus these two, and a third: the expectation takes A to be
    independent of this step's gradient. So v̂, with its bias correction, is that of the steps
    *before*; the first step, which has none, leaves averages and batch size alone, as do, in every
    step, coordinates whose gradient has been 0 until then. As the weights of Adam's average of
    gradients sum to 1, b1 does not enter; that they are old is neglected, and so is weight decay.

    Adam's steps have a length that hardly depends on the gradient's, so A⁻¹ is no measure of
    curvature unless α makes it one: expect sizes of the right trend, and use `scale` for the rest.

    `update` takes what that of `cabs` takes, on path (b) with the diagonal of the variance:

        moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn, variance="diagonal"))
        m = moments_of(params, batch, mask=None)
        updates, state = tx.update(
            m.mean, state, params, value=m.value, gradient_variance=m.variance, count=m.count)

    `count` may be left out; where it is zero, everything stays as it is. With `moments=m` in their
    place, gradients may be clipped before: A is then that of the gradient as measured, so that the
    size is that of the unclipped run, but for `eps`. In `masked` and `partition` a diagonal needs
    `moments=` or `mask_compatible_extra_args=True`. A step that is not finite is
    treated as by `cabs`, and passed on to Adam as by `optax.adam`: guard it by
    `optax.apply_if_finite`.

    Args:
      learning_rate: Learning rate α ≥ 0: a float, a traced scalar, or an optax schedule; of one
        that falls, see `cabs`.
      b1: Decay of the average of the gradients, in [0, 1).
      b2: Decay of the average of their squares, in [0, 1).
      eps: Added to √v̂; at least 0.
      half_life: In place of b2, the examples after which a square has half its weight, as in
        `scale_by_adam`: the larger the batches, the sooner in steps; that needs `count`.
      weight_decay: Decoupled weight decay, at least 0, multiplied by α as in `optax.adamw`.
      min_batch_size: Smallest size, at least 1.
      max_batch_size: Largest size, at most 2**31 − 1.
      decay: Constant of the running averages of tr(AΣ̂)/α and of the loss, in [0, 1).
      scale: Factor c ≥ 0 on the batch size.
      optimal_value: Lower bound F* on the loss, or "estimated" for F − F* from the progress of the
        loss itself, as `rules.cabs` describes; that needs `count` (or `moments`).
      debias: As in `cabs`.
      initial_batch_size: Size of the first batch; the smallest legal size by default.
      round_to: As in `cabs`.
      beyond_max: As in `cabs`; exact for plain gradient descent, for Adam as good as A is a measure
        of curvature.
      axis_name: Mapped axis over which path (a) is split, inside a `shard_map` of one's own.

    Returns:
      An optax optimizer with a `CoupledState`, for `batch_size(state)`. `gradient_variance` in its
      `info` and averages is tr(AΣ̂)/α; the noise scale is that of the plain gradient.

    Raises:
      ValueError: If an argument is out of range. Values traced by JAX are not checked. `update`
        raises it for arguments that disagree in shape, and for a trace instead of a diagonal.

    References:
      Balles, Romero and Hennig, [Coupling Adaptive Batch Sizes with Learning
      Rates](https://arxiv.org/abs/1612.05086), 2017, for A = α·1.
      Kingma and Ba, [Adam](https://arxiv.org/abs/1412.6980), 2015.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, example):
      ...     return (params["w"] @ example["x"] - example["y"]) ** 2
      >>> inputs = jax.random.normal(jax.random.key(0), (4000, 3))
      >>> data = {"x": inputs, "y": inputs @ jnp.array([1.0, -2.0, 3.0])}
      >>> moments_fn = jax.jit(cabs_jax.gradient_moments(loss_fn, variance="diagonal"))
      >>> params, position = {"w": jnp.zeros(3)}, 0
      >>> tx = cabs_jax.cabs_adam(learning_rate=0.2, min_batch_size=4, max_batch_size=64)
      >>> state = tx.init(params)
      >>> for _ in range(40):
      ...     size = int(cabs_jax.batch_size(state))
      ...     batch = jax.tree.map(lambda x: x[position:position + size], data)
      ...     position += size
      ...     m = moments_fn(params, batch)
      ...     updates, state = tx.update(
      ...         m.mean, state, params, value=m.value, gradient_variance=m.variance)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(4 <= cabs_jax.batch_size(state) <= 64 and m.value < 1.0)
      True
    """
    for name, number in (("b1", b1), ("b2", b2)):
        check_number(name, number, "in [0, 1)", lambda x: 0 <= x < 1)
    for name, number in (("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, number, "a non-negative number", lambda x: x >= 0)
    rule_to_size = sizing(
        rules.cabs(learning_rate, scale=scale, optimal_value=optimal_value),
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        decay=decay,
        debias=debias,
        initial_batch_size=initial_batch_size,
        round_to=round_to,
        beyond_max=beyond_max,
    )
    adam = (
        optax.scale_by_adam(b1, b2, eps) if half_life is None else scale_by_adam(half_life, b1, eps)
    )
    direction = optax.chain(adam, optax.add_decayed_weights(weight_decay))

    def noise(variance: PyTree, before: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns tr(AΣ̂)/α, A being that of the steps before, and whether there were any."""
        adam, _ = before
        # The number of steps before, and what the weights of their squares add up to.
        if half_life is None:
            steps, weight = adam.count, 1 - b2**adam.count
        else:
            steps, weight = adam.step, adam.weight
        known = steps > 0
        second_moment = jax.tree.map(
            lambda v: v.astype(jnp.float32) / jnp.where(known, weight, 1), adam.nu
        )

        def divided(spread: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.where(v > 0, spread / (jnp.sqrt(jnp.where(v > 0, v, 1)) + eps), 0)

        return tree_sum(jax.tree.map(divided, variance, second_moment)), known

    return _coupled(rule_to_size, direction, learning_rate, axis_name, "diagonal", noise)


def _coupled(
    rule_to_size: Sizing,
    direction: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    axis_name: Hashable | None,
    variance: Variance = "trace",
    noise: Callable[[PyTree, Any], tuple[jax.Array, ArrayLike]] = lambda trace, _: (trace, True),
) -> optax.GradientTransformationExtraArgs:
    """Steps by −α along a direction that has a memory.

    Args:
      rule_to_size: What tracks the batch size.
      direction: From the mean gradient to the direction.
      learning_rate: α, a scalar or a schedule.
      axis_name: Mapped axis over which path (a) is split.
      variance: What `noise` needs of the gradient covariance.
      noise: `(variance, state of direction before the step) -> (ξ, known)`; where ξ is not known
        the averages and the batch size stay as they are.
    """
    direction = optax.with_extra_args_support(direction)

    def init(params: PyTree) -> CoupledState:
        return CoupledState(rule_to_size.initial_state(), direction.init(params))

    def update(
        updates: PyTree,
        state: CoupledState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CoupledState]:
        moments = read_moments(updates, params, axis_name, variance, **extra_args)
        covariance = measured(moments.gradient_variance, "gradient_variance")
        xi, known = noise(covariance, state.direction)
        adapted = rule_to_size.advance(state.adapt, moments, xi)
        adapted = select(jnp.asarray(known), adapted, held(state.adapt, adapted))
        directed, direction_state = direction.update(
            moments.mean, state.direction, params, count=moments.count
        )
        scaled = _scaled(directed, _step_size(learning_rate, rule_to_size, state.adapt))
        return unless_empty(moments.count, scaled, CoupledState(adapted, direction_state), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _step_size(
    learning_rate: ScalarOrSchedule, rule_to_size: Sizing, state: AdaptBatchSizeState
) -> ArrayLike:
    nominal = at_step(learning_rate, state.step)
    # Left as it is, in its own precision, wherever nothing can scale it.
    return nominal * rule_to_size.learning_rate_scale(state) if rule_to_size.beyond_max else nominal


def _scaled(direction: PyTree, step_size: ArrayLike) -> PyTree:
    return jax.tree.map(lambda d: -jnp.asarray(step_size, d.dtype) * d, direction)


def _effective(learning_rate: ScalarOrSchedule, momentum: ArrayLike) -> ScalarOrSchedule:
    """Returns how far a gradient moves the parameters in the end, as a multiple of itself."""
    if callable(learning_rate):
        return lambda step: learning_rate(step) / (1 - momentum)
    return learning_rate / (1 - momentum)
