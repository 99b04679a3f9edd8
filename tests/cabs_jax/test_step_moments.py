import jax.numpy as jnp
import pytest

import cabs_jax

PARAMS = {"b": jnp.zeros(()), "w": jnp.zeros(3)}
MEAN = {"b": jnp.ones(()), "w": jnp.ones(3)}
GRADS = {"b": jnp.ones(4), "w": jnp.ones((4, 3))}
LOSSES = jnp.ones(4)


def update(grads=GRADS, params=PARAMS, **extra_args):
    tx = cabs_jax.cabs(0.1)
    return tx.update(grads, tx.init(params), params, **extra_args)


@pytest.mark.slow
def test_both_paths_accept_unknown_arguments():
    update(value=LOSSES, mask=None, count=None, gradient_variance=None, loss_scale=2.0)
    update(MEAN, value=1.0, gradient_variance=1.0, mask=None, loss_scale=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "value=None"),
        ({"value": LOSSES, "params": None}, "params=None"),
        ({"value": LOSSES, "grads": {"w": jnp.ones((4, 3))}}, "tree like the parameters"),
        ({"value": jnp.ones(3)}, r"4 examples.*shape \(3,\)"),
        ({"value": jnp.ones((4, 1))}, r"shape \(4, 1\)"),
        ({"value": LOSSES, "grads": MEAN}, r"gradient\['b'\] has shape \(\).*gradient_variance="),
        (
            {"value": LOSSES, "grads": GRADS | {"w": jnp.ones(3)}},
            r"gradient\['w'\] has shape \(3,\).*parameter, of shape \(3,\)",
        ),
        (
            {"value": LOSSES, "grads": GRADS | {"w": jnp.ones((5, 3))}},
            r"disagree.*\['b'\] has 4.*\['w'\] has 5",
        ),
        ({"value": LOSSES, "mask": jnp.ones(3, bool)}, r"\(4,\).*shape \(3,\)"),
        ({"value": LOSSES, "mask": jnp.ones((4, 1), bool)}, r"shape \(4, 1\)"),
        ({"value": LOSSES, "mask": jnp.ones(4)}, "boolean.*dtype float32"),
        ({"value": LOSSES, "count": 4}, "count=4"),
        ({"value": LOSSES, "grads": {}, "params": {}}, "no gradient"),
    ],
)
def test_hostile_per_example_arguments_are_shown(arguments, message):
    with pytest.raises(ValueError, match=message):
        update(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grads": GRADS}, r"gradient\['b'\] has shape \(4,\).*Leave gradient_variance out"),
        ({"grads": MEAN | {"w": jnp.ones(2)}}, r"gradient\['w'\] has shape \(2,\)"),
        ({"value": LOSSES}, r"mean loss.*shape \(4,\)"),
        ({"mask": jnp.ones(4, bool)}, r"mask of shape \(4,\).*count=moments.count"),
        ({"gradient_variance": jnp.ones(4)}, r"gradient_variance.*\[\(4,\)\]"),
        ({"gradient_variance": GRADS}, r"gradient_variance.*\[\(4,\), \(4, 3\)\]"),
        ({"gradient_variance": {"a": jnp.ones(()), "w": jnp.ones(3)}}, "gradient_variance"),
        ({"count": jnp.ones(4, int)}, r"count.*shape \(4,\)"),
        ({"count": 4.5}, "count.*dtype float32"),
        ({"count": -1}, "count must be the number of real examples, got -1"),
    ],
)
def test_hostile_mean_arguments_are_shown(arguments, message):
    with pytest.raises(ValueError, match=message):
        update(**({"grads": MEAN, "value": 1.0, "gradient_variance": 1.0} | arguments))


@pytest.mark.slow
def test_empty_trees_are_fine_with_the_moments():
    updates, state = update({}, {}, value=1.0, gradient_variance=1.0)
    assert updates == {}
    assert state.info.mean_gradient_squared_norm == 0.0


def test_plain_numbers_will_do():
    updates, state = update(2.0, 1.0, value=0.5, gradient_variance=3)
    assert updates == pytest.approx(-0.2)
    assert state.info.gradient_variance == 3.0
    assert state.info.mean_gradient_squared_norm == 4.0
