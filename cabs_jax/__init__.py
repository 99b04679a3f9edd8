"""Adaptive batch sizes coupled to the learning rate, for JAX and Optax."""

from cabs_jax import rules
from cabs_jax._jaxlib_check import warn_if_miscompiling as _warn_if_miscompiling
from cabs_jax.compilation import CompiledStep
from cabs_jax.loader import BatchLoader, Position, buckets
from cabs_jax.moments import Explanation, explain, gradient_moments, per_example_value_and_grad
from cabs_jax.on_device import OnDeviceResult, StepMetrics, on_device_loop
from cabs_jax.optimizers import cabs, cabs_adam
from cabs_jax.rules import Statistics
from cabs_jax.state import AdaptBatchSizeState, CoupledState, Info, batch_size
from cabs_jax.statistics import GradientMoments
from cabs_jax.transform import adapt_batch_size

__all__ = [
    "AdaptBatchSizeState",
    "BatchLoader",
    "CompiledStep",
    "CoupledState",
    "Explanation",
    "GradientMoments",
    "Info",
    "OnDeviceResult",
    "Position",
    "Statistics",
    "StepMetrics",
    "adapt_batch_size",
    "batch_size",
    "buckets",
    "cabs",
    "cabs_adam",
    "explain",
    "gradient_moments",
    "on_device_loop",
    "per_example_value_and_grad",
    "rules",
]

_warn_if_miscompiling()
