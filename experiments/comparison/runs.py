"""Runs of many methods, learning rates and seeds as one program, but for momentum and Adam."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cabs_jax
from cabs_jax import rules
from cabs_jax.statistics import PyTree
from experiments.comparison.problems import Problem, mean_loss
from experiments.training import averages, descent

MOMENTUM = 0.9
ADAM_FACTOR = 0.01  # of its learning rates: 2e-4 to 0.04 where those of the grid are 0.02 to 4
BLOCK = 16  # examples computed at a time, the smallest size

FromRate = Callable[[Any], optax.GradientTransformationExtraArgs]


class Method(NamedTuple):
    """A way to choose batch sizes, and perhaps learning rates.

    Attributes:
      rule: From the learning rate, which may be traced, and the examples of a run, to the rule.
      rate: From the same to what the learning rate is at each step.
      first: Size of the first batch.
      decay: Constant of the running averages.
      factor: The learning rate of a run as a multiple of that of the grid.
      alone: From the learning rate to a complete optimizer, for what is no plain gradient descent:
        its runs are a program of their own, and the rest is not heard.
      variance: What that optimizer asks for.
    """

    rule: Callable[[jax.Array, int], rules.Rule]
    rate: Callable[[Any, int], descent.Rate] = lambda rate, examples: descent.constant(rate)
    first: int = 16
    decay: float = 0.95
    factor: float = 1.0
    alone: FromRate | None = None
    variance: Literal["trace", "diagonal"] = "trace"


def _constant(size: int, rate: Callable[[Any, int], descent.Rate] | None = None) -> Method:
    method = Method(lambda rate, examples: rules.constant(size), first=size)
    return method if rate is None else method._replace(rate=rate)


def _with_momentum(
    alone: FromRate,
) -> Method:
    # In the end a gradient moves the parameters by α/(1 − β): as far as without momentum.
    return Method(lambda rate, examples: rules.constant(16), factor=1 - MOMENTUM, alone=alone)


def _with_adam(
    alone: FromRate,
    variance: Literal["trace", "diagonal"] = "diagonal",
) -> Method:
    method = _with_momentum(alone)
    return method._replace(factor=ADAM_FACTOR, variance=variance)


def _constant_along(size: int, direction: optax.GradientTransformation) -> FromRate:
    adapt = cabs_jax.adapt_batch_size(rules.constant(size), initial_batch_size=size)
    return lambda rate: descent.descend(adapt, direction, descent.constant(rate))


METHODS = {
    "constant 16": _constant(16),
    "constant 128": _constant(128),
    "CABS": Method(lambda rate, examples: rules.cabs(rate)),
    "CABS, estimated": Method(lambda rate, examples: rules.cabs(rate, optimal_value="estimated")),
    "constant 32": _constant(32),
    "constant 64": _constant(64),
    "constant 512": _constant(512),
    "constant 16, step decay": _constant(16, descent.step_decay),
    "constant 16, cosine decay": _constant(16, descent.cosine),
    "geometric growth": Method(
        lambda rate, examples: rules.schedule(descent.growing_sizes(16, examples))
    ),
    "expected progress, L = 1/α": Method(
        lambda rate, examples: rules.expected_progress(rate, 1 / rate)
    ),
    "norm test, θ = 1": Method(lambda rate, examples: rules.norm_test(1.0)),
    "norm test, θ = 3": Method(lambda rate, examples: rules.norm_test(3.0)),
    "biased norm test, θ = 0.9": Method(lambda rate, examples: rules.biased_norm_test(0.9)),
    "noise scale": Method(
        lambda rate, examples: rules.noise_scale(),
        rate=lambda rate, examples: descent.noise_scaled(rate),
    ),
    "Big Batch SGD": Method(lambda rate, examples: rules.big_batch(), decay=0.0),
    "constant 16, momentum": _with_momentum(_constant_along(16, optax.trace(MOMENTUM))),
    "constant 128, momentum": _with_momentum(_constant_along(128, optax.trace(MOMENTUM))),
    "CABS, momentum": _with_momentum(lambda rate: cabs_jax.cabs(rate, momentum=MOMENTUM)),
    "CABS, estimated, momentum": _with_momentum(
        lambda rate: cabs_jax.cabs(rate, momentum=MOMENTUM, optimal_value="estimated")
    ),
    "constant 16, Adam": _with_adam(_constant_along(16, optax.scale_by_adam()), "trace"),
    "constant 128, Adam": _with_adam(_constant_along(128, optax.scale_by_adam()), "trace"),
    "CABS, Adam": _with_adam(cabs_jax.cabs_adam),
    "CABS, estimated, Adam": _with_adam(
        lambda rate: cabs_jax.cabs_adam(rate, optimal_value="estimated")
    ),
}
MAIN = tuple(METHODS)[:4]


class Grid(NamedTuple):
    """The runs: every method at every learning rate with every seed."""

    methods: Sequence[str]
    learning_rates: Sequence[float]
    seeds: Sequence[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of methods, learning rates and seeds."""
        return len(self.methods), len(self.learning_rates), len(self.seeds)


class Run(NamedTuple):
    """How far a run has come, or many of them: what the next stretch goes on from."""

    params: PyTree
    opt_state: PyTree
    position: cabs_jax.Position


class Stretch(NamedTuple):
    """What the runs measured up to a number of examples; arrays of shape (*grid.shape, ...).

    Attributes:
      loss: Mean loss over all training examples, above the optimum.
      averaged_loss: That of the averaged weights.
      batch_sizes: Of each step of the stretch, int32 (..., steps); 0 beyond the last.
    """

    loss: np.ndarray
    averaged_loss: np.ndarray
    batch_sizes: np.ndarray


def optimizer_of(
    methods: Sequence[Method], which: jax.Array, rate: jax.Array, examples: int
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent as method number `which` of `methods` would have it, averages kept.

    A rule costs next to nothing, so all are asked and one is heard: methods differ in a number, and
    runs of all of them are one program.

    Args:
      methods: All of them.
      which: Index of one, int32 scalar.
      rate: Learning rate, float32 scalar.
      examples: Of a whole run.
    """
    if len(methods) == 1 and methods[0].alone is not None:
        return averages.with_averages(methods[0].alone(rate * methods[0].factor))

    def heard(answers: Iterable[Any]) -> jax.Array:
        return jnp.stack([jnp.asarray(answer, jnp.float32) for answer in answers])[which]

    all_rules = [method.rule(rate, examples) for method in methods]
    all_rates = [method.rate(rate, examples) for method in methods]
    adapt = cabs_jax.adapt_batch_size(
        lambda statistics: heard(rule(statistics) for rule in all_rules),
        decay=heard(method.decay for method in methods),
        initial_batch_size=heard(method.first for method in methods),
    )
    descend = descent.descend(
        adapt,
        optax.identity(),
        lambda observed: heard(rate(observed) for rate in all_rates),
    )
    return averages.with_averages(descend)


def stretches(problem: Problem, grid: Grid, ends: Sequence[int]) -> Iterator[Stretch]:
    """Trains all runs side by side: those of plain gradient descent, and each other method's.

    Args:
      problem: What to minimise.
      grid: The runs.
      ends: Numbers of examples seen, increasing. A run pauses after the batch that reaches each.
    """
    together = [name for name in grid.methods if METHODS[name].alone is None]
    groups = [[name] for name in grid.methods if name not in together]
    groups = [together, *groups] if together else groups
    places = [grid.methods.index(name) for group in groups for name in group]
    order = np.argsort(places)
    parts = [_stretches(problem, grid._replace(methods=group), ends) for group in groups]
    for of_groups in zip(*parts, strict=True):
        yield Stretch(*(np.concatenate(x)[order] for x in zip(*of_groups, strict=True)))


def _stretches(problem: Problem, grid: Grid, ends: Sequence[int]) -> Iterator[Stretch]:
    """Those of methods that are one program."""
    chosen = [METHODS[name] for name in grid.methods]
    most = max(np.diff([0, *ends])) // BLOCK + 1
    which, rate, seed = (
        jnp.asarray(axis.reshape(-1))
        for axis in np.meshgrid(
            np.arange(len(chosen)),
            np.asarray(grid.learning_rates, np.float32),
            np.arange(len(grid.seeds)),
            indexing="ij",
        )
    )
    data_seeds = jnp.asarray(grid.seeds, jnp.uint32)

    def start(which: jax.Array, rate: jax.Array, seed: jax.Array) -> Run:
        params = jax.tree.map(lambda x: x[seed], problem.starts)
        state = optimizer_of(chosen, which, rate, ends[-1]).init(params)
        zero = jnp.zeros((), jnp.int32)
        return Run(params, state, cabs_jax.Position(zero, zero))

    def go_on(
        run: Run, which: jax.Array, rate: jax.Array, seed: jax.Array, end: jax.Array
    ) -> tuple[Run, tuple[jax.Array, jax.Array, jax.Array]]:
        loop = cabs_jax.on_device_loop(
            problem.loss,
            optimizer_of(chosen, which, rate, ends[-1]),
            variance=chosen[0].variance,
            averaged_params=lambda state: state.exponential,
            microbatch_size=BLOCK,
            max_steps=int(most),
            seed=data_seeds[seed],
        )
        left = end - run.opt_state.examples
        *reached, metrics = loop(
            run.params, run.opt_state, problem.data, run.position, num_examples=left
        )
        run = Run(*reached)
        loss, averaged_loss = (
            mean_loss(problem.loss, params, problem.data) - problem.optimum
            for params in (run.params, run.opt_state.exponential)
        )
        return run, (loss, averaged_loss, metrics.batch_size)

    run = jax.jit(jax.vmap(start))(which, rate, seed)
    advance = jax.jit(jax.vmap(go_on, in_axes=(0, 0, 0, 0, None)), donate_argnums=0)
    for end in ends:
        run, measured = advance(run, which, rate, seed, jnp.int32(end))
        yield Stretch(*(np.asarray(x).reshape(*grid.shape, *x.shape[1:]) for x in measured))
