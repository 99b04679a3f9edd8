"""Rules: pure functions from the statistics of training to the batch size it asks for.

A rule takes `Statistics` and returns a float32 scalar, the size of the next batch before rounding
and bounds; infinity asks for the largest legal size, zero for the smallest. Any such function can
be given to `cabs_jax.adapt_batch_size`; the factories here make the rules of the literature:

| rule | size | from |
|---|---|---|
| `cabs` | c·α·ξ / (F − F* + ε) | Balles et al. 2017 |
| `expected_progress` | 2Lα/(2 − Lα) · ξ/‖∇F‖² | Balles et al. 2017 |
| `norm_test` | ξ / (θ²‖∇F‖²) | Byrd et al. 2012, unbiased |
| `biased_norm_test` | ξ / (θ²‖ḡ‖²) | Byrd et al. 2012 |
| `noise_scale` | ξ / ‖∇F‖² | McCandlish et al. 2018 |
| `big_batch` | m, or (1 + δ)·m if too noisy | De et al. 2017 |
| `seesaw` | m₀·max α/α | Meterez et al. 2025 |
| `schedule` | given sizes | Smith et al. 2018 |
| `constant` | a given size | the baseline |

ξ = tr Σ̂ is the trace of the gradient covariance, F the loss and α the learning rate. Where a rule's
numerator is zero (no noise, or no step) it answers 0; else, where its denominator is not positive
(no loss, or no gradient, left to measure), it answers infinity. Where the learning rate is negative
it answers NaN, and the size stays as it was; a value that is not traced raises.

>>> import jax.numpy as jnp
>>> statistics = Statistics(
...     value=jnp.float32(0.5), gradient_variance=jnp.float32(40.0),
...     squared_gradient_norm=jnp.float32(0.25), count=jnp.int32(17),
...     step=jnp.int32(0), batch_size=jnp.int32(17))
>>> float(cabs(learning_rate=0.5)(statistics))  # 0.5 · 40 / 0.5
40.0
>>> def square_root_growth(statistics):  # a rule of one's own
...     return 16.0 * jnp.sqrt(1.0 + statistics.step)
>>> float(square_root_growth(statistics))
16.0

The last three are schedules, which need neither loss nor variance: `update(gradient, state,
params)` will do, with `count=` where they count examples.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cabs_jax._arguments import check_number
from cabs_jax.learning_rates import ScalarOrSchedule, at_step, check_coupled
from cabs_jax.size_schedules import constant as constant
from cabs_jax.size_schedules import schedule as schedule
from cabs_jax.size_schedules import seesaw as seesaw
from cabs_jax.statistics import Rule as Rule
from cabs_jax.statistics import Statistics as Statistics
from cabs_jax.statistics import measured, noise_in_squared_norm

OptimalValue = ArrayLike | Literal["estimated"]


def cabs(
    learning_rate: ScalarOrSchedule,
    *,
    scale: ArrayLike = 1.0,
    eps: ArrayLike = 0.0,
    optimal_value: OptimalValue = 0.0,
) -> Rule:
    """Couples the batch size to the learning rate: m = c·α·ξ / (F − F* + ε).

    Of the batch sizes that guarantee progress per step, this one makes the most of each example
    when α ≈ 1/L and ‖∇F‖² ≈ 2L(F − F*), L being the Lipschitz constant of the gradient.

    With `optimal_value="estimated"` neither F* nor that luck with α is needed. F − F* is read off
    the progress of the loss, and the noise is what it is seen to be:

        m = 2c·m'·N / G,    N = min(α·ξ/(4m'), E),    G = (S₁ − S₇) / (1 − 1/7),

    m' being the present size. Derivation: on a quadratic, gradient descent loses to noise a floor
    of N = α·ξ/(2(2 − αL)·m), about α·ξ/(4m), and the loss falls fastest per example where that
    floor is half of what is left, N = (F − F*)/2. S_η is the average of the loss over the n
    examples seen, that at the n'-th having the weight (n'/n)^η; if F(n) = F* + A/n, it is
    F* + (1 + 1/η)·A/n, so that two averages tell G = A/n. A loss that falls more slowly has more
    left than G, which then is what can still be gained in a few times the examples. E, the running
    average of F(w) − F(w̄), is the loss that noise is *seen* to cost, since averaged weights w̄ are
    rid of it; without `averaged_value`, N = α·ξ/(4m') alone, and a plateau, where the loss does not
    fall though noise is not to blame, makes the batch grow, which wastes examples.

    Where E ≤ 0 noise costs nothing and the answer is the smallest size; else, where G ≤ 0, the loss
    does not fall and the answer is the largest. Either is approached gradually: ln m moves by at
    most min(0.02, 4m/n) a step, since the averages tell nothing faster. Assumed are a loss that is
    the same function throughout (after a change of data or penalty the averages need as many
    examples again), and losses drawn with the weights that the step starts from.

    Args:
      learning_rate: Learning rate α ≥ 0 of the step −α·ḡ; a scalar or a schedule, called with the
        index of the step. With heavy-ball momentum β the effective rate is α/(1 − β). A schedule
        that falls takes the size down with it, and draws a warning: give the peak instead.
      scale: Factor c ≥ 0 on the batch size.
      eps: ε ≥ 0, added to the denominator.
      optimal_value: Lower bound F* on the loss, or "estimated", which needs `count`. Where F ≤ F*
        the answer is infinity (0 if α·ξ = 0).

    Returns:
      The rule.

    Raises:
      ValueError: If an argument is not finite or out of range.

    References:
      Balles, Romero and Hennig, [Coupling Adaptive Batch Sizes with Learning
      Rates](https://arxiv.org/abs/1612.05086), 2017.
      Shamir and Zhang, [Stochastic Gradient Descent for Non-smooth
      Optimization](https://arxiv.org/abs/1212.1824), 2013, for the averages S_η.
    """
    check_coupled(learning_rate)
    check_number("scale", scale, "a non-negative number", lambda x: x >= 0)
    check_number("eps", eps, "a non-negative number", lambda x: x >= 0)
    if isinstance(optimal_value, str):
        if optimal_value != "estimated":
            raise ValueError(
                f'optimal_value must be a number or "estimated", got {optimal_value!r}.'
            )
        lower_bound = None
    else:
        check_number("optimal_value", optimal_value, "a finite number", lambda _: True)
        lower_bound = optimal_value

    def noise(statistics: Statistics) -> jax.Array:
        alpha = _effective_rate(learning_rate, statistics)
        return _float32(scale) * alpha * _variance(statistics)

    def with_eps(gap: jax.Array) -> jax.Array:
        return jnp.where(gap <= 0, gap, gap + _float32(eps))

    def rule(statistics: Statistics) -> jax.Array:
        if lower_bound is not None:
            gap = _float32(measured(statistics.value, "value")) - _float32(lower_bound)
            return _ratio(noise(statistics), with_eps(gap))
        measured(statistics.value, "value")
        if statistics.estimated_gap is None:
            raise ValueError(
                'optimal_value="estimated" counts examples: pass moments= or count= to update, got '
                "count=None."
            )
        floor = noise(statistics) / 2
        if statistics.averaged_excess is not None:
            excess = 2 * _float32(scale) * _float32(statistics.batch_size)
            floor = jnp.minimum(floor, excess * statistics.averaged_excess)
        return _gradually(_ratio(floor, with_eps(statistics.estimated_gap)), statistics)

    return rule


def expected_progress(learning_rate: ScalarOrSchedule, lipschitz: ArrayLike) -> Rule:
    """Maximises the expected progress per example: m = 2Lα/(2 − Lα) · ξ/‖∇F‖².

    Needs `count`. The answer is infinity where Lα ≥ 2 or the estimate of ‖∇F‖² is not positive.

    Args:
      learning_rate: Learning rate α ≥ 0; a scalar or a schedule, called with the index of the step.
      lipschitz: Lipschitz constant L > 0 of the gradient.

    Returns:
      The rule.

    Raises:
      ValueError: If an argument is not finite or out of range.

    References:
      Balles, Romero and Hennig, [Coupling Adaptive Batch Sizes with Learning
      Rates](https://arxiv.org/abs/1612.05086), 2017.
    """
    check_coupled(learning_rate)
    check_number("lipschitz", lipschitz, "a positive number", lambda x: x > 0)

    def rule(statistics: Statistics) -> jax.Array:
        curvature = _float32(lipschitz) * _effective_rate(learning_rate, statistics)
        norm, _ = _unbiased_squared_norm(statistics, "expected_progress")
        return _ratio(
            2 * curvature * _variance(statistics),
            jnp.maximum(2 - curvature, 0) * jnp.maximum(norm, 0),
        )

    return rule


def norm_test(theta: ArrayLike) -> Rule:
    """Bounds the relative error of the gradient by θ: m = ξ / (θ²‖∇F‖²).

    Needs `count`, for the unbiased estimate of ‖∇F‖².

    Args:
      theta: Bound θ > 0 on the root mean square of ‖ḡ − ∇F‖ / ‖∇F‖.

    Returns:
      The rule.

    Raises:
      ValueError: If theta is not positive.

    References:
      Byrd, Chin, Nocedal and Wu, [Sample size selection in optimization methods for machine
      learning](https://doi.org/10.1007/s10107-012-0572-5), 2012.
    """
    check_number("theta", theta, "a positive number", lambda x: x > 0)

    def rule(statistics: Statistics) -> jax.Array:
        norm, _ = _unbiased_squared_norm(statistics, "norm_test")
        return _ratio(_variance(statistics), jnp.square(_float32(theta)) * norm)

    return rule


def biased_norm_test(theta: ArrayLike) -> Rule:
    """The norm test as published: m = ξ / (θ²‖ḡ‖²), ‖ḡ‖² being that of the mini-batch.

    ‖ḡ‖² holds the noise ξ/m besides the signal, so the test never asks for more than about m/θ²
    examples: at θ = 1 the size would never leave the minimum, hence θ < 1. ‖ḡ‖² is put together
    again as ‖∇F‖² + ξ/(m − 1) from the averages, which is exact where `decay` is 0, as published,
    or the size constant. Needs `count`.

    Args:
      theta: Bound 0 < θ < 1 on the relative error of the gradient.

    Returns:
      The rule.

    Raises:
      ValueError: If theta lies outside (0, 1).

    References:
      Byrd, Chin, Nocedal and Wu, [Sample size selection in optimization methods for machine
      learning](https://doi.org/10.1007/s10107-012-0572-5), 2012.
    """
    check_number(
        "theta",
        theta,
        "in (0, 1), since the biased test asks for at most about m/θ² examples",
        lambda x: 0 < x < 1,
    )

    def rule(statistics: Statistics) -> jax.Array:
        unbiased, count = _unbiased_squared_norm(statistics, "biased_norm_test")
        variance = _variance(statistics)
        norm = unbiased + noise_in_squared_norm(variance, count)
        return _ratio(variance, jnp.square(_float32(theta)) * norm)

    return rule


def noise_scale() -> Rule:
    """The simple gradient noise scale: m = ξ / ‖∇F‖².

    Needs `count`, for the unbiased estimate of ‖∇F‖².

    Returns:
      The rule.

    References:
      McCandlish, Kaplan, Amodei et al., [An Empirical Model of Large-Batch
      Training](https://arxiv.org/abs/1812.06162), 2018.
    """

    def rule(statistics: Statistics) -> jax.Array:
        norm, _ = _unbiased_squared_norm(statistics, "noise_scale")
        return _ratio(_variance(statistics), norm)

    return rule


def big_batch(theta: ArrayLike = 1.0, *, growth: ArrayLike = 0.1) -> Rule:
    """Grows the batch while noise drowns the gradient: θ²‖ḡ‖² ≤ V/m asks for ⌈(1 + δ)·m⌉.

    V = ξ·m/(m − 1) is the sample variance. This is the published test with a fixed step size, where
    δ = 0.1, θ is left out (1), and each test sees one batch: give `adapt_batch_size` a `decay` of 0
    for that. It differs in one thing: a batch that fails is not filled up and tested again before
    the step; its step is made, and the next batch is the larger one. The size never falls. Legal
    sizes must lie closer together than a factor 1 + δ, or rounding undoes the growth. Needs
    `count`.

    Args:
      theta: Bound θ > 0 on the relative noise √(V/m) / ‖ḡ‖.
      growth: Relative increase δ > 0 of a batch that fails.

    Returns:
      The rule.

    Raises:
      ValueError: If an argument is not positive.

    Example:
      >>> import cabs_jax, optax
      >>> tx = optax.chain(
      ...     cabs_jax.adapt_batch_size(big_batch(), decay=0.0, initial_batch_size=32),
      ...     optax.scale_by_learning_rate(0.1))

    References:
      De, Yadav, Jacobs and Goldstein, [Big Batch SGD: Automated Inference using Adaptive Batch
      Sizes](https://arxiv.org/abs/1610.05792), 2017, algorithm 1.
    """
    check_number("theta", theta, "a positive number", lambda x: x > 0)
    check_number("growth", growth, "a positive number", lambda x: x > 0)

    def rule(statistics: Statistics) -> jax.Array:
        unbiased, count = _unbiased_squared_norm(statistics, "big_batch")
        noise = noise_in_squared_norm(_variance(statistics), count)
        fails = jnp.square(_float32(theta)) * (unbiased + noise) <= noise
        size = _float32(statistics.batch_size)
        # A batch without noise passes, at a minimum of the loss too.
        return jnp.where(fails & (noise > 0), jnp.ceil((1 + _float32(growth)) * size), size)

    return rule


def _effective_rate(learning_rate: ScalarOrSchedule, statistics: Statistics) -> jax.Array:
    """Returns the learning rate α of a step times s; NaN where α < 0, from which no size follows.

    Where what stands before has made s·ḡ of the measured gradient ḡ, the step −α·s·ḡ is one of s·α.
    """
    rate = _float32(at_step(learning_rate, statistics.step))
    return jnp.where(rate < 0, jnp.nan, rate) * _float32(statistics.gradient_scale)


def _variance(statistics: Statistics) -> jax.Array:
    return _float32(measured(statistics.gradient_variance, "gradient_variance"))


def _unbiased_squared_norm(statistics: Statistics, rule_name: str) -> tuple[jax.Array, jax.Array]:
    measured(statistics.gradient_variance, "gradient_variance")
    if statistics.squared_gradient_norm is None or statistics.count is None:
        raise ValueError(
            f"rules.{rule_name} needs the number of examples, to estimate ‖∇F‖² without bias: "
            "pass count=moments.count to update, got count=None."
        )
    return _float32(statistics.squared_gradient_norm), statistics.count


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    safe = jnp.where(denominator <= 0, 1, denominator)
    quotient = jnp.where(denominator <= 0, jnp.inf, numerator / safe)
    answer = jnp.where(numerator <= 0, 0, quotient)
    return jnp.where(jnp.isnan(numerator), numerator, answer)


def _gradually(target: jax.Array, statistics: Statistics) -> jax.Array:
    """Returns a size on the way from the one before to the target."""
    before, count, examples = statistics.raw_batch_size, statistics.count, statistics.examples
    if before is None or count is None or examples is None:
        raise ValueError("a rule that moves gradually needs raw_batch_size, count and examples.")
    pace = jnp.minimum(0.02, 4 * _float32(count) / examples)
    return jnp.clip(target, before * jnp.exp(-pace), before * jnp.exp(pace))


def _float32(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
