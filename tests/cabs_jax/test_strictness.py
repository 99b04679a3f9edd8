"""What the library itself computes, under JAX's strictest settings and for every dtype of a net."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest

import cabs_jax

RULES = {
    "cabs": cabs_jax.rules.cabs(0.1),
    "expected_progress": cabs_jax.rules.expected_progress(0.1, lipschitz=1.0),
    "norm_test": cabs_jax.rules.norm_test(1.0),
    "biased_norm_test": cabs_jax.rules.biased_norm_test(0.5),
    "noise_scale": cabs_jax.rules.noise_scale(),
    "big_batch": cabs_jax.rules.big_batch(),
    "constant": cabs_jax.rules.constant(32),
    "schedule": cabs_jax.rules.schedule(lambda step: 16 + step),
}


@contextmanager
def strict(x64=False):
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        yield


@pytest.fixture(
    params=[
        "float32",
        pytest.param("float64", marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", marks=pytest.mark.exhaustive),
    ]
)
def dtype(request):
    with strict(x64=request.param == "float64"):
        yield jnp.dtype(request.param)


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean(jnp.square(hidden - x[:3]))


def problem(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jax.random.normal(keys[0], (5, 3), dtype), "b": jnp.zeros(3, dtype)}
    return params, jax.random.normal(keys[1], (8, 5), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "factored"},
        {"method": "factored", "variance": "diagonal"},
        {"method": "factored", "microbatch_size": 4},
        {"method": "per_example"},
        {"method": "between", "groups": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_moments(options, dtype):
    params, batch = problem(dtype)
    moments = jax.jit(cabs_jax.gradient_moments(loss_fn, **options))(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mean)} == {dtype}
    assert moments.value.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments.variance)} == {"float32"}
    assert moments.count.dtype == jnp.int32


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", RULES)
def test_rules_within_the_transformation(rule, dtype):
    params, _ = problem(dtype)
    tx = cabs_jax.adapt_batch_size(RULES[rule], round_to=(16, 32, 64))
    state, update = tx.init(params), jax.jit(tx.update)
    for value, variance, count in ((1.0, 3.0, 8), (0.0, 0.0, 1), (0.5, 1.0, 0)):
        moments = {"value": value, "gradient_variance": variance, "count": count}
        updates, state = update(params, state, params, **jax.tree.map(as_strong, moments))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {dtype}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


def as_strong(number):
    return jnp.asarray(number, jnp.int32 if isinstance(number, int) else jnp.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_cabs_on_per_example_gradients(momentum, dtype):
    params, batch = problem(dtype)
    tx = cabs_jax.cabs(0.1, momentum=momentum)
    losses, grads = jax.jit(cabs_jax.per_example_value_and_grad(loss_fn))(params, batch)
    mask = jnp.arange(8) < 6
    state = jax.jit(tx.init)(params)
    updates, state = jax.jit(tx.update)(grads, state, params, value=losses, mask=mask)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {dtype}
    assert cabs_jax.batch_size(state).dtype == jnp.int32


@pytest.mark.exhaustive
def test_on_device_loop(dtype):
    params, data = problem(dtype)
    tx = cabs_jax.cabs(0.1, min_batch_size=2, max_batch_size=8)
    loop = cabs_jax.on_device_loop(loss_fn, tx, microbatch_size=4, max_steps=4)
    result = jax.jit(loop)(params, tx.init(params), data, cabs_jax.Position(), 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {dtype}
    assert [leaf.dtype.name for leaf in result.metrics] == ["int32", "float32", "float32"]
