"""What users meet when they bring modules of flax, said in words that tell what to do."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.errors import TraceContextError
from flax.training.train_state import TrainState

import cabs_jax

BATCH = jnp.ones((4, 3)), jnp.zeros(4)


def loss_of(model, example):
    x, y = example
    return jnp.square(model(x[None])[0, 0] - y)


@pytest.mark.parametrize("method", ["factored", "per_example", "between"])
@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda rngs: nnx.BatchNorm(3, rngs=rngs), "BatchStat"),
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), "RngCount"),
    ],
    ids=["batch norm", "dropout"],
)
def test_a_module_that_the_loss_closes_over_and_changes(layer, kind, method):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(layer(rngs), nnx.Linear(3, 1, rngs=rngs))

    def moments_of(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        measure = cabs_jax.gradient_moments(
            lambda params, example: loss_of(nnx.merge(graphdef, params, rest), example),
            method=method,
            groups=2 if method == "between" else None,
        )
        return jax.eval_shape(measure, params, BATCH)

    with pytest.raises(TypeError, match=rf"Cannot mutate {kind} .* evaluation mode") as caught:
        moments_of(model)
    assert isinstance(caught.value.__cause__, TraceContextError)
    model.eval()
    assert moments_of(model).count.dtype == jnp.int32


def test_other_errors_of_a_loss_come_through_as_they_are():
    def failing(w, x):
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        cabs_jax.gradient_moments(failing)(jnp.ones(3), BATCH)


@pytest.mark.parametrize("make", [cabs_jax.cabs, cabs_jax.cabs_adam])
def test_apply_gradients_of_linen_passes_no_moments_on(make):
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=make(0.1))
    m = cabs_jax.GradientMoments(jnp.float32(1), {"w": jnp.ones(3)}, jnp.float32(1), jnp.int32(4))
    with pytest.raises(ValueError, match=r"passes nothing on: write updates, .*moments=m"):
        state.apply_gradients(grads=m.mean, moments=m)


@pytest.mark.parametrize("y", [jnp.zeros(4), jnp.zeros(4, int), jnp.zeros((4, 2), bool)])
def test_targets_in_the_place_of_the_mask(y):
    moments_of = cabs_jax.gradient_moments(lambda w, x: jax.numpy.dot(w, x))
    with pytest.raises((TypeError, ValueError), match=r"pass \(params, \(x, y\)\), not"):
        moments_of(jnp.ones(3), BATCH[0], y)
