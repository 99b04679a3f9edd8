import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import methods
from experiments.training.config import RunConfig
from experiments.training.step import make_train_step


def loss(params, example):
    return 0.5 * jnp.square(example["x"] @ params - example["y"])


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "y": (x.sum(1) + rng.normal(size=size)).astype(np.float32)}


def start(method="cabs"):
    optimizer = methods.build(RunConfig(method=method))
    params = jnp.zeros(4)
    state = jax.tree.map(jnp.copy, optimizer.init(params))  # leaves that may be donated
    return make_train_step(loss, optimizer), params, state


@pytest.mark.slow
def test_a_step_is_sgd_and_reports_the_statistics_of_its_batch():
    step, params, state = start("constant")
    batch = batch_of(32)
    new_params, _, info = step(params, state, batch)

    grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    losses = jax.vmap(loss, (None, 0))(params, batch)
    np.testing.assert_allclose(new_params, params - 0.1 * grads.mean(0), rtol=1e-5)
    np.testing.assert_allclose(info.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(info.gradient_variance, grads.var(0).sum(), rtol=1e-5)
    np.testing.assert_allclose(info.learning_rate, 0.1, rtol=1e-6)
    assert info.next_batch_size == 16


@pytest.mark.slow
def test_padding_changes_nothing():
    step, params, state = start()
    batch = batch_of(27)
    exact = step(params, state, batch)
    rows = {key: np.concatenate([leaf, np.zeros_like(leaf[:13])]) for key, leaf in batch.items()}
    padded = step(params, state, rows, np.arange(40) < 27)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), exact, padded)
