"""The noise scale V/‖∇F‖², measured over steps, and how far it can be trusted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cabs_jax.statistics import is_absurd, noise_in_squared_norm

_STANDARD_ERRORS = 2.0  # a 95 % interval


class NoiseScale(NamedTuple):
    """Running means of V and ‖∇F‖², and their covariance from step to step; float32 scalars.

    V = ξ·m/(m − 1) and ‖ḡ‖² − ξ/(m − 1), of a batch of m, are unbiased for the trace of the
    covariance and for ‖∇F‖². Their ratio is not, so each is averaged by itself. The means are
    those of exponential weights, divided by the weights' sum.

    Attributes:
      weight: Sum of the weights, 1 − decay^n after n steps.
      variance: Mean of V.
      squared_norm: Mean of ‖ḡ‖² − ξ/(m − 1).
      variance_spread: Variance of V from step to step.
      squared_norm_spread: That of ‖ḡ‖² − ξ/(m − 1).
      covariance: Covariance of the two.
    """

    weight: jax.Array
    variance: jax.Array
    squared_norm: jax.Array
    variance_spread: jax.Array
    squared_norm_spread: jax.Array
    covariance: jax.Array

    def estimate(self) -> jax.Array:
        """Returns the noise scale, infinite where the mean of ‖∇F‖² is not positive."""
        positive = self.squared_norm > 0
        ratio = self.variance / jnp.where(positive, self.squared_norm, 1)
        return jnp.where(positive, ratio, jnp.inf)

    def interval(self, decay: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the ends of Fieller's 95 % interval for the noise scale.

        It holds every R for which the mean of V − R·‖∇F‖² lies within two standard errors of 0.
        The steps count as independent: each has a batch of its own. What changes on the way widens
        the interval. The upper end is infinite while ‖∇F‖² cannot be told from 0, and after one
        step nothing is known: 0 and infinity.
        """
        # Σw²/(Σw)² of the weights: one over the number of steps that the means are worth.
        known = jnp.where(self.weight > 0, self.weight, 1)
        share = (1 - decay) * (2 - known) / ((1 + decay) * known)
        several = (self.weight > 0) & (share < 0.999)
        error = _STANDARD_ERRORS**2 * share / jnp.where(several, 1 - share, 1)
        # a·R² − 2b·R + c ≤ 0 is what the interval's definition says.
        a = jnp.square(self.squared_norm) - error * self.squared_norm_spread
        b = self.variance * self.squared_norm - error * self.covariance
        c = jnp.square(self.variance) - error * self.variance_spread
        root = b + jnp.sqrt(jnp.maximum(jnp.square(b) - a * c, 0))
        bounded = several & (root > 0)
        low = jnp.where(bounded & (c > 0), c / jnp.where(root > 0, root, 1), 0)
        high = jnp.where(bounded & (a > 0), root / jnp.where(a > 0, a, 1), jnp.inf)
        return low, high


def no_noise_scale() -> NoiseScale:
    """Returns the means before the first step, no two of which share their memory."""
    return NoiseScale(*(jnp.zeros((), jnp.float32) for _ in NoiseScale._fields))


def advance(
    scale: NoiseScale,
    trace: jax.Array,
    biased_norm: jax.Array,
    count: jax.Array,
    decay: jax.Array,
) -> NoiseScale:
    """Returns the means after a batch; a single example, whose variance is unknown, changes none.

    Args:
      scale: Those before it.
      trace: Trace ξ of its gradient covariance, float32 scalar.
      biased_norm: ‖ḡ‖² of its mean gradient, float32 scalar.
      count: Number m of its examples, int32 scalar.
      decay: Constant of the running means, float32 scalar.
    """
    noise = noise_in_squared_norm(trace, count)  # V/m
    variance, squared_norm = trace + noise, biased_norm - noise
    spreads = jnp.stack(scale[3:])
    afresh = (
        is_absurd(scale.variance, variance)
        | is_absurd(scale.squared_norm, squared_norm)
        | ~jnp.isfinite(spreads).all()
    )
    weight = jnp.where(afresh, 0, decay * scale.weight) + (1 - decay)
    share = (1 - decay) / weight
    d_variance, d_norm = variance - scale.variance, squared_norm - scale.squared_norm
    products = jnp.stack([d_variance * d_variance, d_norm * d_norm, d_variance * d_norm])
    spread = jnp.where(afresh | (scale.weight == 0), 0, (1 - share) * (spreads + share * products))
    advanced = NoiseScale(
        weight,
        scale.variance + share * d_variance,
        scale.squared_norm + share * d_norm,
        *spread,
    )
    several: NoiseScale = jax.tree.map(
        lambda new, old: jnp.where(count > 1, new, old), advanced, scale
    )
    return several
