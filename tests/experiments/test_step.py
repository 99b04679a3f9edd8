import jax
import jax.numpy as jnp
import numpy as np

from experiments import methods
from experiments.buckets import pad
from experiments.config import RunConfig
from experiments.step import CompiledStep, make_train_step


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


def test_padding_changes_nothing():
    step, params, state = start()
    batch = batch_of(27)
    exact = step(params, state, batch)
    padded = step(params, state, *pad(batch, 40))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), exact, padded)


def test_each_shape_is_compiled_once():
    step, params, state = start()
    traces = []

    def counted(params, opt_state, batch, mask=None):
        traces.append(None)
        return step(params, opt_state, batch, mask)

    compiled = CompiledStep(counted)
    for seed, (size, bucket) in enumerate([(16, 32), (20, 32), (40, 64), (32, 32), (64, 64)]):
        params, state, info = compiled(params, state, *pad(batch_of(size, seed), bucket))
    assert len(compiled.executables) == len(traces) == 2
    assert compiled.compile_seconds > 0
    assert np.isfinite(info.loss)

    params, state, _ = compiled(params, state, batch_of(64))
    assert len(compiled.executables) == 3


def test_the_compiled_step_computes_what_the_step_does():
    step, params, state = start()
    batch = batch_of(16)
    expected = jax.jit(step)(params, state, batch)
    compiled = CompiledStep(step)(params.copy(), jax.tree.map(jnp.copy, state), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, compiled)
