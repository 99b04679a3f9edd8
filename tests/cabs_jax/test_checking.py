"""What is wrong with a loss is said before training, and nothing is said of a right one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cabs_jax import check_loss

X = jax.random.normal(jax.random.key(0), (8, 4))
BATCH = {"x": X, "y": X.sum(1)}
PARAMS = {"w": jnp.ones(4), "scale": jnp.float32(0.5)}


def predict(params, x):
    return params["scale"] * (x @ params["w"])


def loss_fn(params, example):
    return (predict(params, example["x"]) - example["y"]) ** 2


def batch_loss(params, batch):
    return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2)


def normalised(x, axis):
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_said_of_a_right_loss(dtype):
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, BATCH))

    def in_float32(loss):
        return lambda params, batch: loss(params, batch).astype(jnp.float32)

    check_loss(in_float32(loss_fn), params, batch)
    check_loss(in_float32(loss_fn), params, batch, in_float32(batch_loss))


@pytest.mark.slow
def test_random_numbers_of_the_examples_own_are_fine():
    keys = jax.random.split(jax.random.key(1), 8)
    check_loss(
        lambda params, example: loss_fn(params, example) * jax.random.uniform(example["key"]),
        PARAMS,
        BATCH | {"key": keys},
    )


def test_a_loss_that_takes_a_key_is_given_one():
    def noisy(params, example, rng):
        return loss_fn(params, example) * jax.random.uniform(rng)

    check_loss(noisy, PARAMS, BATCH, rng=jax.random.key(1))
    with pytest.raises(TypeError, match="pass one key as rng="):
        check_loss(noisy, PARAMS, BATCH)


@pytest.mark.slow
def test_batch_normalisation_is_called_by_its_name():
    def of_one(params, example):
        one = jax.tree.map(lambda x: x[None], example)
        return of_batch(params, one)

    def of_batch(params, batch):
        return batch_loss(params, batch | {"x": normalised(batch["x"], 0)})

    with pytest.raises(ValueError, match=r"loss of the batch is .* 8 examples .*batch normalisati"):
        check_loss(of_one, PARAMS, BATCH, of_batch)


def test_a_sum_for_a_mean_is_called_so():
    with pytest.raises(ValueError, match="sum over the examples: divide it by their number"):
        check_loss(loss_fn, PARAMS, BATCH, lambda p, batch: 8 * batch_loss(p, batch))


def test_a_penalty_in_one_of_the_two_is_seen():
    def penalised(params, batch):
        return batch_loss(params, batch) + 0.1 * jnp.sum(params["w"] ** 2)

    with pytest.raises(ValueError, match="a penalty, dropout or weights in only one"):
        check_loss(loss_fn, PARAMS, BATCH, penalised)


@pytest.mark.slow
def test_gradients_that_disagree_are_seen():
    def stopped(params, batch):
        return batch_loss(params | {"w": jax.lax.stop_gradient(params["w"])}, batch)

    with pytest.raises(ValueError, match="losses agree, but their gradients do not"):
        check_loss(loss_fn, PARAMS, BATCH, stopped)


@pytest.mark.slow
def test_values_that_are_kept_outside_of_the_loss_are_seen():
    kept = []

    def keeping(params, example):
        kept.append(loss_fn(params, example))
        return kept[-1]

    with pytest.raises(ValueError, match="keeps a value of its own in something outside of it"):
        check_loss(keeping, PARAMS, BATCH)


@pytest.mark.parametrize("kind", ["counter", "numpy"])
def test_a_loss_that_changes_from_call_to_call_is_seen(kind):
    count, random = itertools.count(), np.random.default_rng(0)

    def changing(params, example):
        factor = next(count) if kind == "counter" else jnp.asarray(random.uniform(size=1))[0]
        return factor * loss_fn(params, example)

    with pytest.raises(ValueError, match="another function at its second call"):
        check_loss(changing, PARAMS, BATCH)


def test_a_module_that_changes_is_seen():
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="changes a module that was made outside of it"):
        check_loss(lambda w, x: jnp.sum(model(x[None]) * w), jnp.ones(()), X)


@pytest.mark.slow
def test_nothing_is_said_of_modules_keys_and_custom_derivatives():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    net = linen.Dense(3)
    variables = net.init(jax.random.key(0), X[0])

    def loss(params, example):
        key = jax.random.fold_in(jax.random.key(0), example["id"])
        x = example["x"] + jax.random.normal(key, (4,))
        outputs = nnx.merge(graphdef, params[0])(x), net.apply(params[1], x)
        return sum(jnp.sum(jax.nn.relu(y)) for y in outputs)

    check_loss(loss, (params, variables), {"x": X, "id": jnp.arange(8)})


@pytest.mark.parametrize("jitted", [False, True])
def test_random_numbers_that_examples_share_are_seen(jitted):
    key = jax.random.key(0)

    def dropped(params, example):
        keep = jax.random.bernoulli(key, 0.5, example["x"].shape)
        return loss_fn(params, example | {"x": jnp.where(keep, example["x"], 0)})

    with pytest.warns(UserWarning, match="the same random numbers for every example"):
        check_loss(jax.jit(dropped) if jitted else dropped, PARAMS, BATCH)


@pytest.mark.slow
def test_trouble_with_dtypes_shapes_and_numbers_is_seen():
    with pytest.warns(UserWarning, match="the losses are bfloat16: compute them in float32"):
        check_loss(lambda p, e: loss_fn(p, e).astype(jnp.bfloat16), PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"one floating-point scalar per example"):
        check_loss(lambda p, e: e["x"] * p["w"], PARAMS, BATCH)
    with pytest.raises(ValueError, match="needs the same leading example axis"):
        check_loss(loss_fn, PARAMS, BATCH | {"y": BATCH["y"][:5]})
    with pytest.raises(ValueError, match=r"losses of examples \[3\] are not finite: \[nan\]"):
        check_loss(loss_fn, PARAMS, BATCH | {"y": BATCH["y"].at[3].set(jnp.nan)})
    root = {"x": jnp.zeros((8, 4)), "y": jnp.zeros(8)}
    with pytest.raises(ValueError, match="finite, but some of their gradients are not"):
        check_loss(lambda p, e: jnp.sqrt(jnp.sum((e["x"] * p["w"]) ** 2)), PARAMS, root)
