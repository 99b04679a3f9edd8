"""The ways to choose a batch size: each is a rule of `cabs_jax.rules` in front of plain SGD."""

from collections.abc import Callable

import jax
import optax

import cabs_jax
from cabs_jax import rules
from experiments.config import BUCKETS, RunConfig

METHODS: dict[str, Callable[[RunConfig], rules.Rule]] = {
    "biased_norm_test": lambda config: rules.biased_norm_test(config.theta),
    "cabs": lambda config: rules.cabs(config.learning_rate),
    "constant": lambda config: rules.constant(config.batch_size),
    "expected_progress": lambda config: rules.expected_progress(
        config.learning_rate, config.lipschitz or 1 / config.learning_rate
    ),
    "norm_test": lambda config: rules.norm_test(config.theta),
    "noise_scale": lambda config: rules.noise_scale(),
}


def bounds(config: RunConfig) -> tuple[int, int]:
    """The smallest and the largest batch size that the run may use."""
    if config.method == "constant":
        return config.batch_size, config.batch_size
    return config.min_batch_size, config.max_batch_size


def legal_sizes(config: RunConfig) -> tuple[int, ...]:
    """The sizes that `--round-to buckets` allows."""
    return cabs_jax.buckets(*bounds(config), multiple_of=1)


def build(config: RunConfig) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config` asks for.

    Its state holds the next batch size (`cabs_jax.batch_size`) and the learning rate of the last
    update (`learning_rate`).

    Raises:
        ValueError: `config.method` is unknown.
    """
    if config.method not in METHODS:
        raise ValueError(
            f"unknown method {config.method!r}; known methods: {', '.join(sorted(METHODS))}"
        )
    smallest, largest = bounds(config)
    if config.method == "constant":
        round_to: int | tuple[int, ...] = 1
    elif config.round_to == BUCKETS:
        round_to = legal_sizes(config)
    else:
        round_to = int(config.round_to)
    return optax.chain(
        cabs_jax.adapt_batch_size(
            METHODS[config.method](config),
            min_batch_size=smallest,
            max_batch_size=largest,
            initial_batch_size=config.batch_size,
            round_to=round_to,
        ),
        optax.inject_hyperparams(optax.sgd)(learning_rate=config.learning_rate),
    )


def learning_rate(state: optax.OptState) -> jax.Array:
    """The learning rate of the last update, found in the state of an optimizer built here."""
    found: jax.Array = optax.tree.get(
        state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
    )
    return found
