"""One step of training, compiled once per shape of batch."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import cabs_jax
from experiments import methods


class StepInfo(NamedTuple):
    """Scalars of one step: this batch's statistics and the size that the next should have."""

    loss: jax.Array
    gradient_variance: jax.Array
    learning_rate: jax.Array
    next_batch_size: jax.Array


def make_train_step(
    loss: Callable[[Any, Any], jax.Array], optimizer: optax.GradientTransformationExtraArgs
) -> Callable[..., tuple[Any, Any, StepInfo]]:
    """`train_step(params, opt_state, batch, mask=None) -> (params, opt_state, StepInfo)`.

    Args:
        loss: Maps (params, example) to a scalar.
        optimizer: As `experiments.methods.build` makes them.
    """
    moments_of = cabs_jax.gradient_moments(loss)

    def train_step(
        params: Any, opt_state: Any, batch: Any, mask: Any = None
    ) -> tuple[Any, Any, StepInfo]:
        moments = moments_of(params, batch, mask=mask)
        updates, opt_state = optimizer.update(
            moments.mean,
            opt_state,
            params,
            value=moments.value,
            gradient_variance=moments.variance,
            count=moments.count,
        )
        info = StepInfo(
            loss=moments.value,
            gradient_variance=moments.variance,
            learning_rate=methods.learning_rate(opt_state),
            next_batch_size=cabs_jax.batch_size(opt_state),
        )
        return optax.apply_updates(params, updates), opt_state, info

    return train_step


class CompiledStep:
    """A train step with its executables: one per shape of batch, compiled when first met.

    Attributes:
        executables: From the batch's shape to the compiled step.
        compile_seconds: Wall-clock time spent on tracing and compiling them.
    """

    def __init__(self, train_step: Callable[..., tuple[Any, Any, StepInfo]]):
        self._jitted = jax.jit(train_step, donate_argnames=("params", "opt_state"))
        self.executables: dict[tuple[int, bool], jax.stages.Compiled] = {}
        self.compile_seconds = 0.0

    def __call__(
        self, params: Any, opt_state: Any, batch: Any, mask: Any = None
    ) -> tuple[Any, Any, StepInfo]:
        """Runs `train_step`; `params` and `opt_state` are donated."""
        shape = (len(jax.tree.leaves(batch)[0]), mask is None)
        if shape not in self.executables:
            started = time.perf_counter()
            lowered = self._jitted.lower(params, opt_state, batch, mask)
            self.executables[shape] = lowered.compile()
            self.compile_seconds += time.perf_counter() - started
        result: tuple[Any, Any, StepInfo] = self.executables[shape](params, opt_state, batch, mask)
        return result
