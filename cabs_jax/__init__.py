"""Adaptive batch sizes coupled to the learning rate, for JAX and Optax.

A step measures how much the gradients of its examples differ, and from that follows how many
examples the next step needs. The rooms of the library, in the order of the data:

* `gradient_moments`, `per_example_value_and_grad`, `per_example_gradient_norms`, `explain`
  (`cabs_jax.moments`): from a loss and a batch to the mean gradient and its variance.
* `rules` (`cabs_jax.rules`): from running averages of those, `Statistics`, to the size to ask for.
* `cabs`, `cabs_adam`, `adapt_batch_size`, `batch_size`, `info`: the optax optimizers that keep the
  averages, ask the rule and round its answer to a legal size. `monitor` measures along any other.
* `BatchLoader`, `buckets` (`cabs_jax.loader`): batches of that size from an endless stream of
  examples, each once per epoch.

Beside them, `check_loss` says before the first step what is wrong with a loss, `merge_moments`
accumulates, `scale_with_batch_size` lets the step follow the size and `scale_by_adam` what Adam
remembers, `CompiledStep` compiles the shapes that a growing batch will need before it needs them,
and `on_device_loop` makes many steps without the host.
"""

from importlib import metadata as _metadata

from cabs_jax import rules
from cabs_jax._jaxlib_check import warn_if_miscompiling as _warn_if_miscompiling
from cabs_jax.checking import check_loss
from cabs_jax.compilation import CompiledStep
from cabs_jax.loader import BatchLoader, Position, buckets
from cabs_jax.merging import merge_moments
from cabs_jax.meter import monitor
from cabs_jax.moments import (
    Explanation,
    explain,
    gradient_moments,
    per_example_gradient_norms,
    per_example_value_and_grad,
)
from cabs_jax.on_device import OnDeviceResult, StepMetrics, on_device_loop
from cabs_jax.optimizers import cabs, cabs_adam
from cabs_jax.scaling import scale_by_adam, scale_with_batch_size
from cabs_jax.state import (
    AdaptBatchSizeState,
    CoupledState,
    Info,
    MonitorState,
    batch_size,
    info,
)
from cabs_jax.statistics import GradientMoments, Statistics, WeightSums
from cabs_jax.transform import adapt_batch_size

__all__ = [
    "AdaptBatchSizeState",
    "BatchLoader",
    "CompiledStep",
    "CoupledState",
    "Explanation",
    "GradientMoments",
    "Info",
    "MonitorState",
    "OnDeviceResult",
    "Position",
    "Statistics",
    "StepMetrics",
    "WeightSums",
    "adapt_batch_size",
    "batch_size",
    "buckets",
    "cabs",
    "cabs_adam",
    "check_loss",
    "explain",
    "gradient_moments",
    "info",
    "merge_moments",
    "monitor",
    "on_device_loop",
    "per_example_gradient_norms",
    "per_example_value_and_grad",
    "rules",
    "scale_by_adam",
    "scale_with_batch_size",
]

try:
    __version__ = _metadata.version("cabs_jax")
except _metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_warn_if_miscompiling()
