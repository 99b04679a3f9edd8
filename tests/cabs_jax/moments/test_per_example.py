"""Per-example gradients that are right where the batch is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import per_example_value_and_grad
from cabs_jax.moments.per_example import batch_size_of
from experiments.training import models
from tests.cabs_jax.moments.oracle import assert_close, per_example
from tests.cabs_jax.moments.zoo import ZOO
from tests.cabs_jax.moments.zoo.case import convolution

CASES = ["convolution_2d", "convolution_inside_cond_and_scan", "custom_vjp", "scan_over_time"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_bare_form(name):
    case = ZOO[name]()
    assert_close(
        jax.jit(per_example_value_and_grad(case.loss))(case.params, case.batch),
        per_example(name),
    )


def test_aux_comes_along():
    function = per_example_value_and_grad(lambda p, x: (jnp.dot(p, x), 2 * x), has_aux=True)
    batch = jnp.arange(6.0).reshape(2, 3)
    (losses, aux), grads = function(jnp.ones(3), batch)
    np.testing.assert_array_equal(losses, batch.sum(1))
    np.testing.assert_array_equal(aux, 2 * batch)
    np.testing.assert_array_equal(grads, batch)


def placed(mesh, params, batch):
    return (
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(batch, NamedSharding(mesh, P("data"))),
    )


@pytest.fixture(scope="module")
def papers_net():
    """Loss, parameters, a batch of eight, and their per-example gradients on one device."""
    model = models.build("mnist_2c2d", (28, 28, 1), 10, width=0.25)
    random = np.random.default_rng(0)
    batch = {
        "input": random.integers(0, 256, (8, 28, 28, 1), np.uint8),
        "label": random.integers(0, 10, 8, np.int32),
    }
    bare = jax.vmap(jax.value_and_grad(model.loss), (None, 0))
    wanted = jax.device_get(jax.jit(bare)(model.params, batch))
    return model.loss, model.params, batch, wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("hint", ["none", "mesh", "axis_name"])
def test_the_papers_net_on_eight_devices(papers_net, kind, hint):
    loss, params, batch, wanted = papers_net
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    if hint == "axis_name":
        function = jax.shard_map(
            per_example_value_and_grad(loss, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
    else:
        function = per_example_value_and_grad(loss, mesh=mesh if hint == "mesh" else None)
    assert_close(jax.jit(function)(*placed(mesh, params, batch)), wanted)


@pytest.mark.slow
def test_the_bare_form_is_wrong_on_an_auto_mesh(papers_net):
    loss, params, batch, (losses, wanted) = papers_net
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    bare = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))
    value, grads = bare(*placed(mesh, params, batch))
    assert_close(value, losses)
    # The day this fails, JAX has mended its partitioner, and the warnings in the docs can go.
    with pytest.raises(AssertionError):
        assert_close(grads, wanted, 0.5)


@pytest.mark.slow
def test_the_bare_form_is_refused_on_an_explicit_mesh(papers_net):
    loss, params, batch, _ = papers_net
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    bare = jax.vmap(jax.value_and_grad(loss), (None, 0))
    with pytest.raises(Exception, match=r"[Ss]harding"):
        jax.eval_shape(bare, *placed(mesh, params, batch))


def test_batch_size_is_that_of_all_leaves():
    assert batch_size_of({"x": jnp.ones((4, 2)), "none": None, "y": np.ones(4)}) == 4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.ones((4, 2)), "y": np.ones(3)}, r"'x'.*4, .*'y'.*3"),
        ({"x": np.ones((4, 2)), "y": np.ones(())}, r"'y'.*None"),
        ({}, "none at all"),
    ],
)
def test_leading_axes_that_disagree_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        per_example_value_and_grad(lambda p, e: p)(jnp.ones(()), batch)


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(TypeError, match=r"shape \(3,\) and dtype float32"):
        per_example_value_and_grad(lambda p, x: p * x)(jnp.ones(3), jnp.ones((2, 3)))


def test_the_program_of_a_depthwise_convolution_does_not_grow_with_its_channels():
    def equations(channels):
        def loss(p, x):
            return jnp.sum(convolution(x, p, feature_group_count=channels))

        operands = jnp.ones((3, 3, 1, channels)), jnp.ones((2, 5, 5, channels))
        return str(jax.make_jaxpr(per_example_value_and_grad(loss))(*operands)).count("=")

    assert equations(16) == equations(4)
