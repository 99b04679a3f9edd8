"""Whole modules and other trees that hold more than parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

from cabs_jax import (
    batch_size,
    cabs,
    explain,
    gradient_moments,
    info,
    per_example_value_and_grad,
)
from cabs_jax.checking import check_loss
from cabs_jax.moments.parameters import split
from tests.cabs_jax.moments.oracle import assert_close, moments, per_example_of

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def lenient():
    """Flax mixes ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Net(nnx.Module):
    """Dropout and batch normalisation, which hold keys, a count and running averages."""

    def __init__(self, width=4):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(width, 1, rngs=rngs)
        self.norm.mean[...] = jnp.linspace(-1, 1, width)

    def __call__(self, x, rngs=None):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x))), rngs=rngs))


def loss(model, x):
    return jnp.sum(jnp.square(model(x[None])))


def loss_with_key(model, e):
    return jnp.sum(jnp.square(model(e["x"][None], rngs=nnx.Rngs(e["key"]))))


def with_keys():
    return {"x": jnp.asarray(X), "key": jax.random.split(jax.random.key(1), len(X))}


@pytest.mark.parametrize("variance", ["trace", "diagonal"])
@pytest.mark.parametrize("method", ["factored", "per_example"])
def test_a_whole_nnx_module_has_the_moments_of_its_params(method, variance):
    model = Net()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_params(params, e):
        return loss_with_key(nnx.merge(graph, params, rest), e)

    options = {"method": method, "variance": variance}
    whole = jax.jit(gradient_moments(loss_with_key, **options))(model, with_keys())
    wanted = jax.jit(gradient_moments(of_params, **options))(params, with_keys())
    assert whole.mean.norm.mean.get_value() is None
    assert whole.mean.dropout.rngs.key.get_value() is None
    assert_close(jax.tree.leaves(whole), jax.tree.leaves(wanted), 1e-6)


@pytest.mark.slow
def test_moments_by_every_other_way_take_a_whole_module():
    model = Net()
    model.eval()
    wanted = gradient_moments(loss)(model, X)
    between = gradient_moments(loss, method="between", groups=2)(model, X)
    blocks = jax.jit(gradient_moments(loss, microbatch_size=2))(model, X, averaged_params=model)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    sharded = gradient_moments(loss, mesh=mesh)(model, X)
    np.testing.assert_allclose(blocks.averaged_value, wanted.value, rtol=1e-5)
    for found in (blocks._replace(averaged_value=None), sharded):
        assert_close(jax.tree.leaves(found), jax.tree.leaves(wanted))
    assert_close(jax.tree.leaves(between.mean), jax.tree.leaves(wanted.mean))
    losses, grads = per_example_value_and_grad(loss)(model, X)
    np.testing.assert_allclose(losses.mean(), wanted.value, rtol=1e-5)
    assert grads.first.kernel.shape == (6, 3, 4)
    rows = explain(loss, model, X[0])
    assert [row.parameter for row in rows][-2:] == [".norm.bias.value", ".norm.scale.value"]
    check_loss(loss, model, X, batch_loss=lambda model, x: jnp.mean(jnp.square(model(x))))


@pytest.mark.parametrize("measure", [gradient_moments, per_example_value_and_grad])
def test_one_dropout_mask_for_the_whole_batch_is_refused(measure):
    with pytest.raises(TypeError, match=r"same for all examples.*\.dropout\.rngs\.key"):
        measure(loss)(Net(), X)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["jit", "checkpoint", "scan", "cond"])
def test_draws_by_a_key_among_the_parameters_are_found_inside(wrap):
    def noise(key):
        return jax.random.normal(key)

    def noisy(p, e):
        key = jax.random.wrap_key_data(p["key"]) if "own" not in e else e["own"]
        if wrap == "scan":
            add = jax.lax.scan(lambda x, _: (x + noise(key), None), e["x"][0], None, 2)[0]
        elif wrap == "cond":
            add = jax.lax.cond(e["x"][0] > 0, noise, lambda key: jnp.zeros(()), key)
        else:
            add = {"jit": jax.jit, "checkpoint": jax.checkpoint}[wrap](noise)(key)
        return jnp.sum(p["w"] * e["x"]) * add

    params = {"w": jnp.ones(3), "key": jax.random.key_data(jax.random.key(0))}
    batch = with_keys()
    assert gradient_moments(noisy)(params, {"x": X, "own": batch["key"]}).variance > 0
    with pytest.raises(TypeError, match=r"same for all examples.*\['key'\]"):
        gradient_moments(noisy)(params, {"x": X})


def test_state_that_the_loss_changes_is_refused():
    model = Net()
    model.train()
    with pytest.raises(TypeError, match=r"changes a BatchStat.*model\.eval"):
        gradient_moments(loss_with_key)(model, with_keys())


@pytest.mark.slow
def test_running_averages_of_linen_stay_out_of_the_variance():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))

    net = Normed()
    variables = net.init(jax.random.key(0), X[:1])
    stats = jax.tree.map(lambda x: x + jnp.arange(4.0) / 2, variables["batch_stats"])

    def loss(params, x):
        return jnp.sum(net.apply({"params": params, "batch_stats": stats}, x[None]) ** 2)

    found = gradient_moments(loss)(variables["params"], X)
    wanted = moments(*per_example_of(loss, variables["params"], X))
    assert_close(found, wanted)


@pytest.mark.slow
def test_an_nnx_module_trains_by_its_optimizer():
    model = Net()
    model.eval()
    optimizer = nnx.Optimizer(model, cabs(0.05, min_batch_size=2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        m = gradient_moments(loss)(model, x)
        optimizer.update(model, m.mean, moments=m)
        return m.value

    losses = [float(step(model, optimizer, X)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_array_equal(model.norm.mean[...], jnp.linspace(-1, 1, 4))
    for holder in (optimizer, optimizer.opt_state):
        assert isinstance(batch_size(holder), jax.Array)
        assert batch_size(holder) >= 2
        assert all(isinstance(x, jax.Array) for x in info(holder))


@pytest.mark.slow
def test_an_equinox_module_trains_as_it_is():
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.5)

    def loss(model, e):
        return jnp.sum(model[1](model[0](e["x"]), key=e["key"]) ** 2)

    def parameters(model):
        return eqx.filter(model, eqx.is_inexact_array)

    # Momentum and weight decay, which see parameters without a gradient.
    optimizer = optax.chain(cabs(0.1, momentum=0.5), optax.add_decayed_weights(-1e-3))
    state = optimizer.init(parameters(model))

    @eqx.filter_jit
    def step(model, state, batch):
        m = gradient_moments(loss)(model, batch)
        updates, state = optimizer.update(m.mean, state, model, moments=m)
        return eqx.apply_updates(model, updates), state, m

    stepped, state, m = step(model, state, with_keys())
    assert m.mean[0].activation is None
    assert m.mean[1].p is None
    assert stepped[1].p == 0.5
    assert not np.array_equal(stepped[0].layers[0].weight, model[0].layers[0].weight)
    wanted = gradient_moments(lambda p, e: loss(eqx.combine(p, model), e))(
        parameters(model), with_keys()
    )
    np.testing.assert_allclose(m.variance, wanted.variance, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "per example"])
def test_update_lets_parameters_without_a_gradient_be(kind):
    params = {"w": jnp.ones(3), "rows": jnp.arange(3), "name": "net"}

    def loss(p, x):
        return jnp.sum(p["w"][p["rows"]] * x)

    optimizer = cabs(1.0)
    state = optimizer.init(params)
    if kind == "mean":
        m = gradient_moments(loss, variance="diagonal")(params, X)
        assert m.variance["rows"] is None
        updates, _ = optimizer.update(m.mean, state, params, moments=m)
    else:
        losses, grads = per_example_value_and_grad(loss)(params, X)
        updates, _ = optimizer.update(grads, state, params, value=losses)
    np.testing.assert_allclose(updates["w"], -X.mean(0), rtol=1e-5)
    assert updates["rows"] is None
    assert updates["name"] is None


class Held:
    """Holds an array and is none, like a variable of Keras."""

    def __init__(self, value):
        self.value = value

    def __array__(self):
        return np.asarray(self.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([Held(X)], r"parameter \[0\] is a Held.*v\.value for v in"),
        ([1.5, np.int32(2), "net"], r"only float, int32, str: pass arrays.*eqx\.partition"),
        ([np.ones(3, np.complex64)], "complex"),
    ],
)
def test_what_holds_no_parameters_says_what_to_write(params, message):
    for measure in (gradient_moments, per_example_value_and_grad):
        with pytest.raises(TypeError, match=message):
            measure(lambda p, x: jnp.sum(x))(params, X)


def test_a_split_tree_is_put_together_again():
    tree = {"f": jnp.tanh, "n": 3, "key": jax.random.key(0), "w": np.float16(1), "no": None}
    parts = split(tree)
    assert parts.parameters == {"f": None, "n": None, "key": None, "w": 1, "no": None}
    assert parts.keys == ("['key']",)
    whole = parts.rebuild({**parts.parameters, "w": "new"}, parts.arrays)
    assert whole == {**tree, "w": "new"}
