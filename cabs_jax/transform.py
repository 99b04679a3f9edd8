"""The optax transformation: moments → running averages → rule → rounding → batch size."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cabs_jax import progress
from cabs_jax._arguments import check_number
from cabs_jax.progress import ExampleCount, Progress
from cabs_jax.rounding import (
    LegalSizes,
    RoundTo,
    check_initial_batch_size,
    legal_sizes,
    nearest_legal_size,
)
from cabs_jax.rules import Rule
from cabs_jax.state import AdaptBatchSizeState, Info
from cabs_jax.statistics import (
    PyTree,
    Statistics,
    is_absurd,
    noise_in_squared_norm,
    tree_squared_norm,
)
from cabs_jax.step_moments import StepMoments, read_moments

BeyondMax = Literal["clip", "scale_learning_rate"]


def adapt_batch_size(
    rule: Rule,
    *,
    min_batch_size: ArrayLike = 16,
    max_batch_size: ArrayLike = 2048,
    decay: ArrayLike = 0.95,
    debias: bool = False,
    initial_batch_size: ArrayLike | None = None,
    round_to: RoundTo = 1,
    axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """_Averages the gradient (path a) or passes it on (path b), and tracks the batch size.

    `update` takes what that of `cabs` takes, and returns the mean gradient. A rule of
    `cabs_jax.rules` that needs the squared norm of the gradient needs `count` on path (b).

    Within optax:

    * `chain`: first on path (a), since what follows expects mean gradients; on path (b) after
      whatever should change the gradient before its norm is taken. Adaptive steps and momentum
      follow it.
    * `inject_hyperparams` makes every number a tracer and every function a schedule: name `rule` in
      `static_args`, and the bounds, `initial_batch_size` and `round_to`, which are not checked
      where they are traced.
    * `masked`, `partition`: path (b). Path (a) would leave the example axis on the gradients that
      it does not see; so put `adapt_batch_size` first and partition what follows it.
    * `apply_if_finite`: around path (b); on path (a), which changes the shape of the updates as it
      must not, around what follows `adapt_batch_size`.
    * `reduce_on_plateau`: wants `value=losses.mean()`, which both paths take. The rule does not see
      the factor by which it reduces the step.
    * `MultiSteps` is the wrong tool: it passes on the extra arguments of the last micro-step alone,
      so loss and variance would be those of a fraction of the batch. Accumulate over microbatches
      inside the gradient instead, as `optax.microbatching` does.

    Args:
      rule: Function from `Statistics` to the batch size to aim at: one of `cabs_jax.rules`, or your
        own. Where it answers NaN the size stays as it was.
      min_batch_size: Smallest size, at least 1.
      max_batch_size: Largest size, at most 2**31 − 1.
      decay: Constant of the running averages, in [0, 1). An average that exceeds
        max(|x|, 1) more than 2³² times, x being the step's measurement, starts anew from x: it
        holds a measurement that went wrong, and would for hundreds of steps.
      debias: Whether the averages start at 0 and are divided by 1 − decay^n after n steps. If not,
        that of the loss starts at 1 and the others at 0.
      initial_batch_size: Size of the first batch, within the bounds, rounded to a legal size; the
        smallest legal size by default.
      round_to: An int k for the nearest multiple of k, half to even; or an increasing tuple of
        legal sizes, for the nearest in ratio. The state always holds a legal size.
      axis_name: Mapped axis over which path (a) is split, inside a `shard_map` of one's own.

    Returns:
      An optax transformation with an `AdaptBatchSizeState`.

    Raises:
      TypeError: If rule is not callable.
      ValueError: If an argument is out of range, or if no legal size lies within the bounds. Values
        traced by JAX are not checked. `update` raises it for arguments that disagree in shape.

    Example:
      CABS with momentum, put together by hand (`cabs` has it as an argument): the effective
      learning rate is α/(1 − β).

      >>> import cabs_jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(
      ...     cabs_jax.adapt_batch_size(cabs_jax.rules.cabs(0.1 / (1 - 0.9))),
      ...     optax.trace(0.9),
      ...     optax.scale_by_learning_rate(0.1))
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.array([[3.0, 0.0], [1.0, 2.0]])}
      >>> updates, state = tx.update(grads, state, params, value=jnp.array([0.5, 1.5]))
      >>> print(updates["w"], cabs_jax.batch_size(state))
      [-0.2 -0.1] 16
    """
    return transformation(
        sizing(
            rule,
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            decay=decay,
            debias=debias,
            initial_batch_size=initial_batch_size,
            round_to=round_to,
        ),
        axis_name,
    )


def transformation(
    rule_to_size: Sizing, axis_name: Hashable | None
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that averages the gradient and tracks the batch size."""

    def init(params: PyTree) -> AdaptBatchSizeState:
        del params
        return rule_to_size.initial_state()

    def update(
        updates: PyTree, state: AdaptBatchSizeState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, AdaptBatchSizeState]:
        moments = read_moments(updates, params, axis_name, **extra_args)
        new_state = rule_to_size.advance(state, moments)
        return unless_empty(moments.count, moments.mean, new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Averages(NamedTuple):
    """The running averages of the state, advanced by a step; float32 scalars."""

    value: jax.Array
    gradient_variance: jax.Array
    squared_gradient_norm: jax.Array
    weight: jax.Array


class Sizing(NamedTuple):
    """How the moments of the steps become batch sizes; made by `sizing`, which checks it.

    Attributes:
      rule: From the statistics to the size to aim at.
      legal: The sizes that it is rounded to.
      first: Size of the first batch, not rounded yet.
      decay: Constant of the running averages.
      debias: Whether the averages are divided by their weight.
      beyond_max: Whether the unrounded size may pass the largest one, for a smaller learning rate
        to stand in for the rest.
    """

    rule: Rule
    legal: LegalSizes
    first: int | jax.Array
    decay: ArrayLike
    debias: bool
    beyond_max: bool = False

    def initial_state(self) -> AdaptBatchSizeState:
        """Returns the state before the first step, no two leaves of which share their memory."""
        first = jnp.asarray(self.first, jnp.float32)
        return AdaptBatchSizeState(
            step=jnp.zeros((), jnp.int32),
            batch_size=nearest_legal_size(first, self.legal),
            value_average=jnp.full((), 0.0 if self.debias else 1.0, jnp.float32),
            gradient_variance_average=jnp.zeros((), jnp.float32),
            squared_gradient_norm_average=jnp.zeros((), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
            unrounded_batch_size=jnp.copy(first),
            examples=progress.no_examples(),
            progress=progress.no_progress(),
            info=Info(
                raw_batch_size=jnp.copy(first),
                value=jnp.zeros((), jnp.float32),
                gradient_variance=jnp.zeros((), jnp.float32),
                mean_gradient_squared_norm=jnp.zeros((), jnp.float32),
                bound=jnp.zeros((), jnp.int32),
                learning_rate_scale=jnp.ones((), jnp.float32),
                non_finite=jnp.zeros((), jnp.int32),
            ),
        )

    def advance(
        self, state: AdaptBatchSizeState, moments: StepMoments, *, plain_trace: bool = True
    ) -> AdaptBatchSizeState:
        """Returns the state after a step that had examples: averages, then rule, then rounding.

        Args:
          state: That before the step.
          moments: What its batch said.
          plain_trace: Whether `moments.gradient_variance` is ξ itself: only then does ξ/(m − 1)
            tell the noise in ‖ḡ‖².
        """
        biased_norm = tree_squared_norm(moments.mean)
        noise = None
        if plain_trace and moments.count is not None:
            noise = noise_in_squared_norm(moments.gradient_variance, moments.count)
        averages = self._averages(state, moments, biased_norm, noise)
        examples, progressed = self._progress(state, moments)
        statistics = self._statistics(state, moments, averages, examples, progressed)
        raw = self._ask(
            statistics._replace(squared_gradient_norm=None) if noise is None else statistics
        )
        answered = ~jnp.isnan(raw)
        info = Info(
            raw_batch_size=raw,
            value=moments.value,
            gradient_variance=moments.gradient_variance,
            mean_gradient_squared_norm=biased_norm,
            bound=_bound(raw, self.legal),
            learning_rate_scale=self.learning_rate_scale(state),
            non_finite=jnp.asarray(~answered, jnp.int32),
        )
        adapted = AdaptBatchSizeState(
            step=optax.safe_increment(state.step),
            batch_size=jnp.where(answered, nearest_legal_size(raw, self.legal), state.batch_size),
            value_average=averages.value,
            gradient_variance_average=averages.gradient_variance,
            squared_gradient_norm_average=averages.squared_gradient_norm,
            weight=averages.weight,
            unrounded_batch_size=jnp.where(
                answered, self._within_bounds(raw, state), state.unrounded_batch_size
            ),
            examples=examples,
            progress=progressed,
            info=info,
        )
        measured = jnp.stack([moments.value, moments.gradient_variance, biased_norm])
        flagged = info._replace(non_finite=jnp.ones((), jnp.int32))
        untouched = held(state, adapted._replace(info=flagged))
        selected: AdaptBatchSizeState = select(jnp.isfinite(measured).all(), adapted, untouched)
        return selected

    def learning_rate_scale(self, state: AdaptBatchSizeState) -> jax.Array:
        """Returns what a step is multiplied by, in place of a batch beyond the largest size.

        The noise floor of gradient descent, α·ξ/(4m), is the same for a step of α·max/m on a batch
        of max examples as for one of α on m.
        """
        largest = jnp.asarray(self.legal.maximum, jnp.float32)
        return jnp.minimum(1, largest / jnp.maximum(state.unrounded_batch_size, 1))

    def _within_bounds(self, raw: jax.Array, state: AdaptBatchSizeState) -> jax.Array:
        smallest = jnp.asarray(self.legal.minimum, jnp.float32)
        largest = jnp.asarray(self.legal.maximum, jnp.float32)
        if not self.beyond_max:
            return jnp.clip(raw, smallest, largest)
        # An infinite size has no finite stand-in: the last finite one stays.
        finite = jnp.where(jnp.isinf(raw), jnp.maximum(state.unrounded_batch_size, largest), raw)
        return jnp.maximum(finite, smallest)

    def _averages(
        self,
        state: AdaptBatchSizeState,
        moments: StepMoments,
        biased_norm: jax.Array,
        noise: jax.Array | None,
    ) -> _Averages:
        decay = jnp.asarray(self.decay, jnp.float32)
        weight = decay * state.weight + (1 - decay)
        whole = weight if self.debias else jnp.ones((), jnp.float32)

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            averaged = decay * old + (1 - decay) * new
            # One measurement of 1e38 would last until decay^n has taken it down: for 1,570 steps.
            return jnp.where(is_absurd(old, new), whole * new, averaged)

        norm_average = state.squared_gradient_norm_average
        if noise is not None:
            norm_average = average(norm_average, biased_norm - noise)
        return _Averages(
            value=average(state.value_average, moments.value),
            gradient_variance=average(state.gradient_variance_average, moments.gradient_variance),
            squared_gradient_norm=norm_average,
            weight=weight,
        )

    def _progress(
        self, state: AdaptBatchSizeState, moments: StepMoments
    ) -> tuple[ExampleCount, Progress]:
        """Returns the count of examples and the averages over them, after the step."""
        if moments.count is None:
            return state.examples, state.progress
        examples = progress.add_examples(state.examples, moments.count)
        return examples, progress.advance(
            state.progress,
            moments.value,
            moments.averaged_value,
            moments.count,
            progress.as_float32(examples),
            first=state.weight == 0,
        )

    def _statistics(
        self,
        state: AdaptBatchSizeState,
        moments: StepMoments,
        averages: _Averages,
        examples: ExampleCount,
        progressed: Progress,
    ) -> Statistics:
        divisor = averages.weight if self.debias else jnp.ones((), jnp.float32)
        counted = moments.count is not None
        return Statistics(
            value=averages.value / divisor,
            gradient_variance=averages.gradient_variance / divisor,
            squared_gradient_norm=averages.squared_gradient_norm / divisor,
            count=moments.count,
            step=state.step,
            batch_size=state.batch_size,
            estimated_gap=progressed.gap if counted else None,
            averaged_excess=None if moments.averaged_value is None else progressed.excess,
            raw_batch_size=state.unrounded_batch_size,
            examples=progress.as_float32(examples) if counted else None,
        )

    def _ask(self, statistics: Statistics) -> jax.Array:
        """Returns what the rule answers, a float32 scalar."""
        raw = jnp.asarray(self.rule(statistics), jnp.float32)
        if raw.shape != ():
            raise ValueError(f"the rule must return a scalar, got an array of shape {raw.shape}.")
        return raw


def sizing(
    rule: Rule,
    *,
    min_batch_size: ArrayLike,
    max_batch_size: ArrayLike,
    decay: ArrayLike,
    debias: bool,
    initial_batch_size: ArrayLike | None,
    round_to: RoundTo,
    beyond_max: BeyondMax = "clip",
) -> Sizing:
    """Checks the arguments of `adapt_batch_size`, which says what they mean and what is raised."""
    if not callable(rule):
        raise TypeError(
            f"rule must be a function of Statistics, such as rules.cabs(learning_rate), got "
            f"{rule!r}."
        )
    check_number("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    legal = legal_sizes(min_batch_size, max_batch_size, round_to)
    first = check_initial_batch_size(initial_batch_size, legal)
    if beyond_max not in get_args(BeyondMax):
        raise ValueError(
            f"beyond_max must be one of {', '.join(map(repr, get_args(BeyondMax)))}, got "
            f"{beyond_max!r}."
        )
    return Sizing(rule, legal, first, decay, debias, beyond_max != "clip")


def held(old: AdaptBatchSizeState, new: AdaptBatchSizeState) -> AdaptBatchSizeState:
    """Returns the state after a step from which no batch size follows: it counts, and is shown."""
    info = new.info._replace(raw_batch_size=old.info.raw_batch_size, bound=old.info.bound)
    return old._replace(step=new.step, examples=new.examples, info=info)


def _bound(raw: jax.Array, legal: LegalSizes) -> jax.Array:
    below = raw < jnp.asarray(legal.minimum, jnp.float32)
    above = raw > jnp.asarray(legal.maximum, jnp.float32)
    return above.astype(jnp.int32) - below.astype(jnp.int32)


def unless_empty(
    count: jax.Array | None, updates: PyTree, new_state: PyTree, old_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the updates and the new state, or zeros and the old one if `count` is 0."""
    if count is None:
        return updates, new_state
    nothing = (jax.tree.map(jnp.zeros_like, updates), old_state)
    kept_updates, kept_state = select(count > 0, (updates, new_state), nothing)
    return kept_updates, kept_state


def select(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Returns one of two trees of equal structure, by a boolean scalar."""
    return jax.tree.map(partial(jnp.where, condition), if_true, if_false)
