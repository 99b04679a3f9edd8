"""Per-example gradients that are right where the batch is sharded."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import per_example_value_and_grad
from experiments import models


def largest_error(grads, wanted):
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
    return max(np.max(np.abs(g - w)) / np.max(np.abs(w)) for g, w in pairs)


def test_convolutions_on_a_sharded_batch_are_right_here_and_wrong_in_the_bare_form():
    model = models.build("mnist_2c2d", (28, 28, 1), 10, width=0.125)
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (8, 28, 28, 1), np.uint8),
        "label": random.integers(0, 10, 8, np.int32),
    }
    bare = jax.jit(jax.vmap(jax.value_and_grad(model.loss), (None, 0)))
    _, wanted = jax.device_get(bare(model.params, batch))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(model.params, NamedSharding(mesh, P()))
    for safe in (
        per_example_value_and_grad(model.loss, mesh=mesh),
        per_example_value_and_grad(model.loss),
    ):
        _, grads = jax.jit(safe)(params, sharded)
        assert largest_error(jax.device_get(grads), wanted) < 1e-4
    # The day this fails, JAX has mended its partitioner, and the warnings in the docs can go.
    _, grads = bare(params, sharded)
    assert largest_error(jax.device_get(grads), wanted) > 0.5
