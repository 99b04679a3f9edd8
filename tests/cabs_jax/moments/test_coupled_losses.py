"""Losses of examples that see one another, measured between groups of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import gradient_moments
from tests.cabs_jax.moments.oracle import assert_close

N, GROUPS = 4, 8
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(loc=1.0, size=(N * GROUPS, 3)).astype(np.float32)
PARAMS = {
    "w": RANDOM.normal(size=(3, 2)).astype(np.float32),
    "scale": np.float32(0.5),
}


def contrastive(params, group):
    """Each example is to be nearer to itself than to the others of its group."""
    z = jnp.tanh(group @ params["w"]) * params["scale"]
    return jnp.mean(jax.nn.logsumexp(z @ z.T, axis=1) - jnp.sum(z * z, axis=1))


def by_hand(loss, params, x, variance="trace"):
    """Mean over groups, and n · Var of the groups' gradients, (m−1)/m of it, in float64."""
    with jax.enable_x64(True):
        params, groups = jax.tree.map(np.float64, (params, x.reshape(GROUPS, N, 3)))
        values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(params, groups)
        values, grads = jax.tree.map(np.asarray, (values, grads))
    m = len(x)
    spread = jax.tree.map(lambda g: (m - 1) / m * N * g.var(0, ddof=1), grads)
    by_parameter = jax.tree.map(np.sum, spread)
    wanted = {
        "trace": sum(jax.tree.leaves(by_parameter)),
        "by_parameter": by_parameter,
        "diagonal": spread,
    }
    return values.mean(), jax.tree.map(lambda g: g.mean(0), grads), wanted[variance]


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
def test_moments_of_a_contrastive_loss_are_those_of_its_groups(variance):
    measure = gradient_moments(
        contrastive, method="between", examples_per_loss=N, variance=variance
    )
    m = jax.jit(measure)(PARAMS, X, averaged_params=PARAMS)
    assert_close((m.value, m.mean, m.variance), by_hand(contrastive, PARAMS, X, variance))
    assert int(m.count) == N * GROUPS
    np.testing.assert_allclose(m.averaged_value, m.value, rtol=1e-5)


@pytest.mark.slow
def test_a_mean_over_examples_that_are_independent_is_measured_as_between_groups():
    def of_one(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"])) * params["scale"]

    def of_group(params, group):
        return jnp.mean(jax.vmap(of_one, (None, 0))(params, group))

    one = gradient_moments(of_one, method="between", groups=GROUPS)
    group = gradient_moments(of_group, method="between", examples_per_loss=N)
    assert_close(jax.jit(group)(PARAMS, X), jax.jit(one)(PARAMS, X), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [(AxisType.Auto, {"mesh": True}), (AxisType.Explicit, {}), (AxisType.Auto, {})],
    ids=["Auto, mesh=", "Explicit", "Auto"],
)
def test_groups_on_a_mesh(kind, options):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    options = {"mesh": mesh} if options else {}
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    measure = gradient_moments(contrastive, method="between", examples_per_loss=N, **options)
    m = jax.jit(measure)(params, x)
    groups = X
    if kind is AxisType.Auto and not options:  # an equal part of each shard
        groups = X.reshape(4, GROUPS, N // 4, 3).swapaxes(0, 1).reshape(X.shape)
    assert_close((m.value, m.mean, m.variance), by_hand(contrastive, PARAMS, groups))


@pytest.mark.slow
def test_batch_normalisation_of_linen_with_its_running_averages():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x))

    net = Net()
    variables = jax.jit(net.init)(jax.random.key(0), X[:N])

    def loss(params, group):
        given = variables | {"params": params}
        outputs, updated = net.apply(given, group, mutable=["batch_stats"])
        return jnp.mean(jnp.square(outputs - 1)), updated["batch_stats"]

    measure = gradient_moments(loss, method="between", examples_per_loss=N, has_aux=True)
    m, stats = jax.jit(measure)(variables["params"], X)
    assert_close(
        (m.value, m.mean, m.variance),
        by_hand(lambda *args: loss(*args)[0], variables["params"], X),
        2e-3,
    )
    means = stats["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(means, 0.01 * X.reshape(GROUPS, N, 3).mean(1), rtol=1e-4)
