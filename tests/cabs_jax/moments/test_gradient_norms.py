"""Norms of the gradients of examples are those of float64, wherever the batch lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import per_example_gradient_norms
from tests.cabs_jax.moments.oracle import assert_close, per_example, with_garbage
from tests.cabs_jax.moments.zoo import EXAMPLES, ZOO

KEEP = np.arange(EXAMPLES) % 8 != 2
SOME = [
    "convolution_2d",
    "kernel_made_from_the_example",
    "embedding_as_output_head",
    "merged_queries_keys_and_values",
    "scan_over_time",
    "weight_norm",
    "odd_leaves",
]
WAYS = {
    "Auto": (AxisType.Auto, {}),
    "Auto, mesh=": (AxisType.Auto, {"mesh": True}),
    "Auto, spmd_axis_name=": (AxisType.Auto, {"spmd_axis_name": "data"}),
    "Explicit": (AxisType.Explicit, {}),
}


def expected(name):
    """‖g_i‖ in float64, 0 for padding."""
    grads = jax.tree.leaves(per_example(name)[1])
    squares = sum(np.sum(np.square(g), tuple(range(1, g.ndim))) for g in grads)
    return np.where(KEEP, np.sqrt(squares), 0)


def check(name, placed=None, **options):
    case = ZOO[name]()
    padded = case.params, with_garbage(case.batch, KEEP), jnp.asarray(KEEP)
    function = jax.jit(per_example_gradient_norms(case.loss, **options))
    norms = function(*(padded if placed is None else placed(*padded)))
    assert norms.dtype == jnp.float32
    assert_close(norms, expected(name), case.tolerance)
    return norms


@pytest.mark.parametrize("name", SOME)
def test_norms_are_those_of_float64(name):
    check(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ZOO)
def test_norms_over_the_zoo(name):
    check(name)


@pytest.mark.parametrize("way", WAYS)
def test_norms_on_a_mesh_stay_split(way):
    kind, options = WAYS[way]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    replicated, by_example = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def placed(params, *split):
        return jax.device_put(params, replicated), *jax.device_put(split, by_example)

    options = {"mesh": mesh} if "mesh" in options else options
    norms = check("convolution_2d", placed, **options)
    assert norms.sharding.shard_shape(norms.shape) == (EXAMPLES // 8,)


def test_a_penalty_is_part_of_every_gradient():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w)) + 0.5 * jnp.sum(jnp.square(w))

    w, x = np.linspace(-1, 1, 12).reshape(4, 3), np.random.default_rng(0).normal(size=(5, 4))
    grads = np.einsum("ni,nj->nij", x, 1 - np.tanh(x @ w) ** 2) + w
    norms = jax.jit(per_example_gradient_norms(loss))(*map(np.float32, (w, x)))
    np.testing.assert_allclose(norms, np.linalg.norm(grads.reshape(5, -1), axis=1), rtol=1e-5)


def test_no_gradient_of_an_example_is_held():
    def loss(w, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ w)))

    w, x = jax.ShapeDtypeStruct((256, 256), jnp.float32), jnp.ones((64, 256))
    compiled = jax.jit(per_example_gradient_norms(loss)).lower(w, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 256 * 256
