"""Products with weights that are taken apart before the loss is sorted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from cabs_jax import explain, gradient_moments
from cabs_jax.moments.factored import distributed
from tests.cabs_jax.moments.oracle import assert_close, moments
from tests.cabs_jax.moments.zoo.case import squares


def dropless_experts(p, e):
    x, sizes = e["x"][jnp.argsort(e["expert"])], jnp.bincount(e["expert"], length=3)
    hidden = lax.ragged_dot(x, p["w"], sizes.astype(jnp.int32))
    # Rows that go to no expert are zero.
    few = lax.ragged_dot(jnp.tanh(hidden), p["v"], jnp.array([2, 0, 1], jnp.int32))
    return squares(hidden) + squares(few)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
def test_rows_meet_their_own_expert_in_a_ragged_product(variance, capsys):
    random = np.random.default_rng(0)
    params = {
        "w": random.normal(size=(3, 4, 5)).astype(np.float32),
        "v": random.normal(size=(3, 5, 2)).astype(np.float32),
    }
    batch = {
        "x": random.normal(size=(8, 6, 4)).astype(np.float32),
        "expert": random.integers(0, 3, (8, 6)).astype(np.int32),
    }
    examples = [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), batch) for i in range(8)]
    # Not by vmap, which JAX does not know for this product.
    found = jax.jit(lambda p: [jax.value_and_grad(dropless_experts)(p, e) for e in examples])(
        params
    )
    losses, grads = jax.tree.map(lambda *each: np.stack(each).astype(np.float64), *found)
    measured = jax.jit(gradient_moments(dropless_experts, variance=variance))(params, batch)
    assert_close(measured, moments(losses, grads, variance), 1e-4)
    assert {row.form for row in explain(dropless_experts, params, examples[0])} <= {
        "Gram",
        "direct",
    }
    assert "dot_general" in capsys.readouterr().out


PLACES = np.array([[2, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("stacked", "used"),
    [
        (lambda w: jnp.repeat(w[:, :1], 3, axis=1), lambda x, w, u: x @ w),
        (lambda w: jnp.pad(w, ((0, 0), (0, 0), (1, 2))), lambda x, w, u: (x @ w)[:3]),
        (lambda w: lax.complex(w, 2 * w), lambda x, w, u: jnp.abs(x.astype(w.dtype) @ w)),
        (lambda w: w[:, 0] @ w[0], lambda x, w, u: x * jnp.dot(x, w)),
        (lambda w: jnp.asarray(PLACES), lambda x, place, u: x @ u[:, place]),
    ],
)
def test_a_slice_is_not_taken_for_the_stack_that_a_scan_goes_through(stacked, used):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3)), jnp.float32)
    x = jnp.ones(3)

    def loss(w, x):
        def step(x, one):
            x = jnp.tanh(used(x, one, w[1]))
            return x, x

        return lax.scan(step, x, stacked(w))[1]

    closed, _ = distributed.trace(loss, w, x)
    run = jax.extend.core.jaxpr_as_fun(closed)
    (found,), wanted = jax.jit(lambda *given: (run(*given), loss(*given)))(w, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_places_that_differ_over_a_mesh_are_not_constant(check_vma):
    w, x = jnp.arange(12.0).reshape(3, 4), jnp.arange(3.0)

    def product(w, x):
        return x @ w[:, jnp.arange(2) + 2 * lax.axis_index("data")]

    def traced(w, x):
        return jax.extend.core.jaxpr_as_fun(distributed.trace(product, w, x)[0])(w, x)[0]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    over_mesh = jax.shard_map(
        traced,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("data"),
        check_vma=check_vma,
    )
    np.testing.assert_array_equal(jax.jit(over_mesh)(w, x), x @ w)
