"""Compiled functions that the runs of one net share, for compiling outlasts many a short run."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments.training import methods, models
from experiments.training.config import RISING_METHODS, RunConfig
from experiments.training.evaluate import make_evaluate
from experiments.training.step import StepInfo, make_update, mean_loss


class SharedPrograms:
    """What is compiled once for a net, however many runs there are.

    A train step is here two programs: the gradient and its moments, one for each batch size, which
    all methods share; and the update, one for each method, whatever the batch size and the learning
    rate. Where the method needs no variance, the first is the plain gradient, so that the time of
    its steps is that of plain SGD.

    Args:
      model: Any initialisation of the net.
    """

    def __init__(self, model: models.Model):
        self.evaluate = make_evaluate(model.predict)
        gradients = {
            ("none", False): _plain_gradient(model.loss),
            ("trace", False): cabs_jax.gradient_moments(model.loss),
            ("trace", True): _gated_gradient(model.loss, "trace"),
            ("diagonal", False): cabs_jax.gradient_moments(model.loss, variance="diagonal"),
            ("diagonal", True): _gated_gradient(model.loss, "diagonal"),
        }
        self._gradients = {
            kind: cabs_jax.CompiledStep(gradient, batch_argnums=(1, 2))
            for kind, gradient in gradients.items()
        }
        self._updates: dict[RunConfig, cabs_jax.CompiledStep] = {}

    def train_step(self, config: RunConfig) -> "SharedStep":
        """The train step of a run, for the state of the optimizer that `config` asks for."""
        # Only what the update depends on tells two of them apart.
        kind = dataclasses.replace(
            config, seed=0, learning_rate=1.0, record_variance=False, test_evaluations=None
        )
        if kind not in self._updates:
            self._updates[kind] = cabs_jax.CompiledStep(
                _update_at_any_rate(kind), batch_argnums=2, donate_argnums=(0, 1)
            )
        variance = measured_variance(config)
        return SharedStep(
            self._gradients[variance, config.gated],
            self._updates[kind],
            config.learning_rate,
            measured=variance != "none",
            gated=config.gated,
        )


def cache_settings(folder: Path) -> dict[str, Any]:
    """Settings of JAX with which all that is compiled goes into `folder`, and is found there."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


def measured_variance(config: RunConfig) -> Literal["none", "trace", "diagonal"]:
    """What of the gradient's covariance the method's batch size depends on."""
    needed = not config.fixed_size and config.method not in RISING_METHODS
    if not (needed or config.record_variance):
        return "none"
    return methods.variance(config)


class SharedStep:
    """Called like the `cabs_jax.CompiledStep` of a whole train step, for one run of many."""

    def __init__(
        self,
        gradient: cabs_jax.CompiledStep,
        update: cabs_jax.CompiledStep,
        learning_rate: float,
        *,
        measured: bool,
        gated: bool,
    ):
        self._gradient, self._update = gradient, update
        self._measured, self._gated = measured, gated
        self._learning_rate = jnp.float32(learning_rate)
        self._compilations, self._seconds_waited = self._totals()

    def __call__(
        self, params: PyTree, opt_state: PyTree, batch: PyTree, mask: jax.Array | None = None
    ) -> tuple[PyTree, PyTree, StepInfo]:
        """Runs the step; the variance it tells is NaN where it was not measured."""
        measured_at = (params, opt_state.exponential) if self._gated else params
        moments = self._gradient(measured_at, batch, mask)
        params, opt_state, info = self._update(params, opt_state, moments, self._learning_rate)
        return (
            params,
            opt_state,
            info if self._measured else info._replace(gradient_variance=math.nan),
        )

    @property
    def compilations(self) -> int:
        """Number of executables that this run's calls compiled."""
        return self._totals()[0] - self._compilations

    @property
    def seconds_waited(self) -> float:
        """Wall-clock seconds for which this run's calls waited for them."""
        return self._totals()[1] - self._seconds_waited

    def _totals(self) -> tuple[int, float]:
        parts = self._gradient, self._update
        return sum(p.compilations for p in parts), sum(p.seconds_waited for p in parts)


def _update_at_any_rate(config: RunConfig) -> Callable[..., tuple[PyTree, PyTree, StepInfo]]:
    def update(
        params: PyTree, opt_state: PyTree, moments: cabs_jax.GradientMoments, rate: jax.Array
    ) -> tuple[PyTree, PyTree, StepInfo]:
        traced = copy.copy(config)
        object.__setattr__(traced, "learning_rate", rate)  # which was checked as a number
        return make_update(methods.build(traced))(params, opt_state, moments)

    return update


def _gated_gradient(
    loss: Callable[[PyTree, PyTree], jax.Array], variance: Literal["trace", "diagonal"]
) -> Callable[..., cabs_jax.GradientMoments]:
    """As `cabs_jax.gradient_moments`, of a pair of parameters and averaged ones."""
    moments_of = cabs_jax.gradient_moments(loss, variance=variance)

    def moments(
        params_and_averaged: tuple[PyTree, PyTree], batch: PyTree, mask: jax.Array | None = None
    ) -> cabs_jax.GradientMoments:
        params, averaged = params_and_averaged
        return moments_of(params, batch, mask, averaged_params=averaged)

    return moments


def _plain_gradient(
    loss: Callable[[PyTree, PyTree], jax.Array],
) -> Callable[..., cabs_jax.GradientMoments]:
    """As `cabs_jax.gradient_moments`, but the variance is 0, unmeasured."""
    gradient = jax.value_and_grad(mean_loss(loss))

    def moments(
        params: PyTree, batch: PyTree, mask: jax.Array | None = None
    ) -> cabs_jax.GradientMoments:
        value, mean = gradient(params, batch, mask)
        size = len(jax.tree.leaves(batch)[0])
        count = jnp.asarray(size if mask is None else jnp.sum(mask), jnp.int32)
        return cabs_jax.GradientMoments(value, mean, jnp.zeros((), jnp.float32), count)

    return moments
