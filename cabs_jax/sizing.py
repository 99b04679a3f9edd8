"""From the moments of a step to the next batch size: averages → rule → rounding."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cabs_jax import noise_scale, progress
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
from cabs_jax.statistics import PyTree, Statistics, is_absurd, noise_in_squared_norm
from cabs_jax.step_moments import StepMoments

BeyondMax = Literal["clip", "scale_learning_rate"]


class _Averages(NamedTuple):
    """The running averages of the state, advanced by a step; float32 scalars."""

    value: jax.Array
    gradient_variance: jax.Array
    squared_gradient_norm: jax.Array
    gradient_scale: jax.Array
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
            gradient_scale_average=jnp.ones((), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
            unrounded_batch_size=jnp.copy(first),
            examples=progress.no_examples(),
            progress=progress.no_progress(),
            noise_scale=noise_scale.no_noise_scale(),
            info=Info(
                raw_batch_size=jnp.copy(first),
                value=jnp.zeros((), jnp.float32),
                gradient_variance=jnp.zeros((), jnp.float32),
                mean_gradient_squared_norm=jnp.zeros((), jnp.float32),
                squared_gradient_norm=jnp.zeros((), jnp.float32),
                noise_scale=jnp.full((), jnp.inf, jnp.float32),
                noise_scale_low=jnp.zeros((), jnp.float32),
                noise_scale_high=jnp.full((), jnp.inf, jnp.float32),
                gradient_scale=jnp.ones((), jnp.float32),
                altered=jnp.zeros((), jnp.int32),
                bound=jnp.zeros((), jnp.int32),
                learning_rate_scale=jnp.ones((), jnp.float32),
                non_finite=jnp.zeros((), jnp.int32),
            ),
        )

    def advance(
        self, state: AdaptBatchSizeState, moments: StepMoments, xi: jax.Array | None = None
    ) -> AdaptBatchSizeState:
        """Returns the state after a step that had examples: averages, then rule, then rounding.

        Args:
          state: That before the step.
          moments: What its batch said.
          xi: What the rule sees in place of the trace ξ, float32 scalar; the trace by default.
        """
        if xi is None:
            xi = moments.trace
        noise = None
        if moments.trace is not None and moments.count is not None:
            noise = noise_in_squared_norm(moments.trace, moments.count)
        averages = self._averages(state, moments, xi, noise)
        examples, progressed = self._progress(state, moments)
        scale = state.noise_scale
        decay = jnp.asarray(self.decay, jnp.float32)
        if moments.trace is not None and moments.count is not None:
            scale = noise_scale.advance(
                scale, moments.trace, moments.squared_norm, moments.count, decay
            )
        low, high = scale.interval(decay)
        raw = self._ask(self._statistics(state, moments, averages, examples, progressed))
        answered = ~jnp.isnan(raw)
        unmeasured = jnp.zeros((), jnp.float32)
        info = Info(
            raw_batch_size=raw,
            value=unmeasured if moments.value is None else moments.value,
            gradient_variance=unmeasured if xi is None else xi,
            mean_gradient_squared_norm=moments.squared_norm,
            squared_gradient_norm=scale.squared_norm,
            noise_scale=scale.estimate(),
            noise_scale_low=low,
            noise_scale_high=high,
            gradient_scale=moments.gradient_scale,
            altered=moments.altered.astype(jnp.int32),
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
            gradient_scale_average=averages.gradient_scale,
            weight=averages.weight,
            unrounded_batch_size=jnp.where(
                answered, self._within_bounds(raw, state), state.unrounded_batch_size
            ),
            examples=examples,
            progress=progressed,
            noise_scale=scale,
            info=info,
        )
        given = [x for x in (moments.value, xi, moments.squared_norm) if x is not None]
        flagged = info._replace(non_finite=jnp.ones((), jnp.int32))
        untouched = held(state, adapted._replace(info=flagged))
        finite = jnp.isfinite(jnp.stack(given)).all()
        selected: AdaptBatchSizeState = select(finite, adapted, untouched)
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
        xi: jax.Array | None,
        noise: jax.Array | None,
    ) -> _Averages:
        decay = jnp.asarray(self.decay, jnp.float32)
        weight = decay * state.weight + (1 - decay)
        whole = weight if self.debias else jnp.ones((), jnp.float32)

        def average(old: jax.Array, new: jax.Array | None) -> jax.Array:
            if new is None:
                return old
            averaged = decay * old + (1 - decay) * new
            # One measurement of 1e38 would last until decay^n has taken it down: for 1,570 steps.
            return jnp.where(is_absurd(old, new), whole * new, averaged)

        # Without a bias towards its start: a clipped run should not look unclipped for a while.
        towards = (1 - decay) / weight * (moments.gradient_scale - state.gradient_scale_average)
        return _Averages(
            value=average(state.value_average, moments.value),
            gradient_variance=average(state.gradient_variance_average, xi),
            squared_gradient_norm=average(
                state.squared_gradient_norm_average,
                None if noise is None else moments.squared_norm - noise,
            ),
            gradient_scale=state.gradient_scale_average + jnp.where(moments.altered, 0, towards),
            weight=weight,
        )

    def _progress(
        self, state: AdaptBatchSizeState, moments: StepMoments
    ) -> tuple[ExampleCount, Progress]:
        """Returns the count of examples and the averages over them, after the step."""
        if moments.count is None:
            return state.examples, state.progress
        examples = progress.add_examples(state.examples, moments.count)
        if moments.value is None:
            return examples, state.progress
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
        counted, weighed = moments.count is not None, moments.value is not None
        varied = moments.trace is not None
        norm = averages.squared_gradient_norm / divisor
        return Statistics(
            value=averages.value / divisor if weighed else None,
            gradient_variance=averages.gradient_variance / divisor if varied else None,
            squared_gradient_norm=norm if counted and varied else None,
            count=moments.count,
            step=state.step,
            batch_size=state.batch_size,
            estimated_gap=progressed.gap if counted and weighed else None,
            averaged_excess=None if moments.averaged_value is None else progressed.excess,
            raw_batch_size=state.unrounded_batch_size,
            examples=progress.as_float32(examples) if counted else None,
            gradient_scale=averages.gradient_scale,
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
