"""The ways to choose a batch size: each is a rule of `cabs_jax.rules` in front of an optimizer."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import optax

import cabs_jax
from cabs_jax import rules
from experiments.training import averages, descent
from experiments.training.config import BUCKETS, RunConfig

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


def bounds(config: RunConfig) -> tuple[int, int]:
    """The smallest and the largest batch size that the run may use."""
    if config.fixed_size:
        return config.batch_size, config.batch_size
    return config.min_batch_size, config.max_batch_size


def legal_sizes(config: RunConfig) -> tuple[int, ...]:
    """The sizes that `--round-to buckets` allows."""
    return cabs_jax.buckets(*bounds(config), multiple_of=1)


def build(config: RunConfig) -> Optimizer:
    """The optimizer that `config` asks for.

    Its state holds the next batch size (`cabs_jax.batch_size`) and the learning rate of the last
    update (`learning_rate`).

    Raises:
      ValueError: `config.method` is unknown.
    """
    if config.method not in METHODS:
        raise ValueError(
            f"unknown method {config.method!r}; known methods: {', '.join(sorted(METHODS))}."
        )
    optimizer = METHODS[config.method](config)
    return averages.with_averages(optimizer) if config.averages or config.gated else optimizer


def variance(config: RunConfig) -> Literal["trace", "diagonal"]:
    """What the optimizer needs to know of the gradient's covariance."""
    return "diagonal" if config.method in ("cabs_adam", "cabs_estimated_adam") else "trace"


def learning_rate(state: optax.OptState) -> jax.Array:
    """The learning rate of the last update, found in the state of an optimizer built here."""
    found: jax.Array = optax.tree.get(
        state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
    )
    return found


def next_learning_rate(config: RunConfig, state: optax.OptState) -> float:
    """The learning rate of the next update, if its batch has the size that the state asks for."""
    if config.method not in RATES:
        return float(learning_rate(state))
    (found,) = (node for node in jax.tree.leaves(state, is_leaf=_descends) if _descends(node))
    next_size = cabs_jax.batch_size(state)
    return float(
        RATES[config.method](config)(descent.Observed(found.examples, next_size, found.adapt))
    )


def _descends(node: Any) -> bool:
    return isinstance(node, descent.DescentState)


def _descend(
    config: RunConfig,
    rule: rules.Rule,
    *,
    decay: float = 0.95,
    direction: optax.GradientTransformation | None = None,
    rate: descent.Rate | None = None,
) -> Optimizer:
    adapt = cabs_jax.adapt_batch_size(rule, decay=decay, **_sizes(config))
    if rate is None and config.method in RATES:
        rate = RATES[config.method](config)
    elif rate is None:
        rate = descent.constant(config.learning_rate)
    return descent.descend(adapt, optax.identity() if direction is None else direction, rate)


def _sizes(config: RunConfig) -> dict[str, Any]:
    smallest, largest = bounds(config)
    if config.fixed_size:
        round_to: int | tuple[int, ...] = 1
    elif config.round_to == BUCKETS:
        round_to = legal_sizes(config)
    else:
        round_to = int(config.round_to)
    return {
        "min_batch_size": smallest,
        "max_batch_size": largest,
        "initial_batch_size": config.batch_size,
        "round_to": round_to,
    }


def _big_batch(config: RunConfig) -> Optimizer:
    # The published 10 %, or as much as it takes to reach the next bucket; each batch is judged
    # alone, as published.
    growth = 0.4 if config.round_to == BUCKETS else 0.1
    return _descend(config, rules.big_batch(config.theta, growth=growth), decay=0.0)


def _constant(
    config: RunConfig, direction: optax.GradientTransformation | None = None
) -> Optimizer:
    schedules = {"step": descent.step_decay, "cosine": descent.cosine}
    rate = None
    if config.schedule in schedules:
        assert config.examples is not None
        rate = schedules[config.schedule](config.learning_rate, config.examples)
    return _descend(config, rules.constant(config.batch_size), direction=direction, rate=rate)


def _geometric_growth(config: RunConfig) -> Optimizer:
    assert config.examples is not None
    sizes = descent.growing_sizes(config.batch_size, config.examples)
    return _descend(config, rules.schedule(sizes))


def _adam(config: RunConfig) -> optax.GradientTransformation:
    """The direction of `optax.adamw`."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay))


def _with_adam(config: RunConfig, rule: rules.Rule) -> Optimizer:
    return _descend(config, rule, direction=_adam(config))


def _power_of_size(power: float) -> Callable[[RunConfig], descent.Rate]:
    """α·(m/m₀)^power for batches of m, m₀ being the first size."""
    return lambda config: descent.scaled(config.learning_rate, config.batch_size, power)


def _ramp_adam(config: RunConfig) -> Optimizer:
    assert config.examples is not None
    return _with_adam(config, rules.schedule(descent.ramp(config.batch_size, config.examples)))


def _seesaw_adam(config: RunConfig) -> Optimizer:
    assert config.examples is not None
    cosine = optax.cosine_decay_schedule(1.0, config.examples // config.batch_size)
    return _with_adam(config, rules.seesaw(cosine, config.batch_size))


def _coupled(config: RunConfig, optimizer: Callable[..., Optimizer], **options: Any) -> Optimizer:
    """A complete optimizer of `cabs_jax`, its learning rate shown in the state."""
    injected: Callable[..., Optimizer] = optax.inject_hyperparams(
        optimizer, static_args=tuple(_sizes(config))
    )
    return injected(config.learning_rate, **options, **_sizes(config))


# Learning rates that depend on the size of the batch.
RATES: dict[str, Callable[[RunConfig], descent.Rate]] = {
    "noise_scale": lambda config: descent.noise_scaled(config.learning_rate),
    "noise_scale_adam": _power_of_size(0.5),
    "ramp_adam": _power_of_size(0.5),
    "seesaw_adam": _power_of_size(-0.5),
}

METHODS: dict[str, Callable[[RunConfig], Optimizer]] = {
    "biased_norm_test": lambda config: _descend(config, rules.biased_norm_test(config.theta)),
    "big_batch": _big_batch,
    "cabs": lambda config: _descend(config, rules.cabs(config.learning_rate)),
    "cabs_adam": lambda config: _coupled(
        config, cabs_jax.cabs_adam, weight_decay=config.weight_decay
    ),
    "cabs_estimated": lambda config: _descend(
        config, rules.cabs(config.learning_rate, optimal_value="estimated")
    ),
    "cabs_estimated_adam": lambda config: _coupled(
        config,
        cabs_jax.cabs_adam,
        weight_decay=config.weight_decay,
        optimal_value="estimated",
    ),
    "cabs_estimated_momentum": lambda config: _coupled(
        config, cabs_jax.cabs, momentum=config.momentum, optimal_value="estimated"
    ),
    "cabs_momentum": lambda config: _coupled(config, cabs_jax.cabs, momentum=config.momentum),
    "constant": _constant,
    "constant_adam": lambda config: _constant(config, _adam(config)),
    "constant_momentum": lambda config: _constant(config, optax.trace(config.momentum)),
    "expected_progress": lambda config: _descend(
        config,
        rules.expected_progress(config.learning_rate, config.lipschitz or 1 / config.learning_rate),
    ),
    "geometric_growth": _geometric_growth,
    "noise_scale": lambda config: _descend(config, rules.noise_scale()),
    "noise_scale_adam": lambda config: _with_adam(config, rules.noise_scale()),
    "norm_test": lambda config: _descend(config, rules.norm_test(config.theta)),
    "ramp_adam": _ramp_adam,
    "seesaw_adam": _seesaw_adam,
}
