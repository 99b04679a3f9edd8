import dataclasses

import pytest

from experiments.training.config import DEFAULT_EXAMPLES, RunConfig


def test_defaults_are_resolved_when_the_configuration_is_made():
    config = RunConfig(dataset="mnist")
    assert config.model == "mnist_2c2d"
    assert config.examples == DEFAULT_EXAMPLES


def test_a_path_gets_the_net_for_colour_photographs():
    assert RunConfig(dataset="some/folder").model == "cifar10_2c3d"


def test_steps_leave_examples_unlimited():
    assert RunConfig(steps=5).examples is None


def test_a_resolved_configuration_reproduces_itself():
    config = RunConfig(dataset="mnist", steps=5)
    assert RunConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "examples": 5}, "not both"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": -0.1}, "learning_rate must be a positive number, got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, got nan"),
        (
            {"learning_rate": 1e39, "method": "constant"},
            r"got 1e\+39; float32 holds 1\.2e-38 to 3\.4e\+38",
        ),
        ({"learning_rate": 1e-60, "method": "constant"}, "learning_rate must be .* got 1e-60"),
        ({"width": float("inf")}, "width must be a positive number, got inf"),
        ({"theta": 10**400}, "theta must be a positive number, got 1000"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1, got 1.0"),
        ({"momentum": 0.9999999999}, "momentum must lie between 0 and 1, got 0.9999999999"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0, got -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay must be a number of at least 0, got inf"),
        ({"max_batch_size": 2**24 + 1}, "max_batch_size must be at most 16777216, got 16777217"),
        ({"batch_size": 10**8, "method": "constant"}, "batch_size must be at most 16777216"),
        ({"examples": 2**31}, r"examples must be at most 2\*\*31 - 1, got 2147483648"),
        ({"schedule": "linear"}, "schedule must be one of constant, step, cosine, got 'linear'"),
        ({"schedule": "step"}, "'step' goes with constant, .*not with 'cabs'"),
        (
            {"method": "constant", "schedule": "cosine", "steps": 9},
            "schedule 'cosine' changes .* give examples, not steps",
        ),
        (
            {"method": "geometric_growth", "steps": 9},
            "geometric_growth changes .* give examples, not steps",
        ),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"seed": 2**32}, r"seed must be at most 2\*\*32 - 1, got 4294967296"),
        ({"lag": -1}, "lag must not be negative, got -1"),
        ({"round_to": 0}, "round_to must be a positive integer or 'buckets', got 0"),
        ({"round_to": "powers"}, "got 'powers'"),
        ({"min_batch_size": 64, "max_batch_size": 32}, "min_batch_size 64 exceeds max_batch_size"),
        ({"batch_size": 8}, r"batch_size 8, where cabs starts, lies outside \[16, 2048\]"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**options)


@pytest.mark.parametrize("method", ["constant", "constant_adam", "constant_momentum"])
def test_a_constant_size_ignores_the_bounds_of_the_adaptive_methods(method):
    config = RunConfig(method=method, batch_size=4096)
    assert config.fixed_size
    assert config.batch_size == 4096
