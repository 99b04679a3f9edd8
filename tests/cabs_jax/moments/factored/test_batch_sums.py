"""Exact moments without per-example gradients, over the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cabs_jax import gradient_moments
from cabs_jax.moments.factored.batch_sums import batch_sums
from cabs_jax.moments.factored.values import Sample
from cabs_jax.moments.per_example import loss_and_aux
from cabs_jax.moments.target import Target
from tests.cabs_jax.moments.oracle import (
    assert_close,
    expected,
    matches,
    names,
    per_example,
    with_garbage,
)
from tests.cabs_jax.moments.zoo import EACH, EXAMPLES, ZOO

KEEP = np.arange(EXAMPLES) % 8 != 2


@pytest.mark.parametrize("name", EACH)
def test_moments_are_those_of_float64_per_example_gradients(name):
    case = ZOO[name]()

    @jax.jit
    def moments(params, batch, padded):
        trace = gradient_moments(case.loss, method="factored")(params, padded, jnp.asarray(KEEP))
        return trace, gradient_moments(case.loss, variance="diagonal")(params, batch)

    with jax.numpy_dtype_promotion("strict"):
        trace, diagonal = moments(case.params, case.batch, with_garbage(case.batch, KEEP))
    assert_close(trace, expected(name, keep=KEEP), case.tolerance)
    assert_close(diagonal, expected(name, "diagonal"), case.tolerance)
    assert trace.variance.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(trace.mean)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", EACH)
def test_only_parameters_named_so_have_no_gradient(name):
    case = ZOO[name]()
    gradients = per_example(name)[1]
    for path, g in zip(names(gradients), jax.tree.leaves(gradients), strict=True):
        assert np.any(g) != matches(path, case.unused), path


@pytest.mark.parametrize("name", ["convolution_2d", "embedding_as_output_head", "weight_norm"])
def test_sums_and_squares_with_weights_of_either_sign(name):
    case = ZOO[name]()
    weights = np.linspace(-1, 2, EXAMPLES).astype(np.float32)
    sample = Sample(EXAMPLES, (), Target("cpu"))
    sums = jax.jit(
        lambda *args: batch_sums(loss_and_aux(case.loss, False), *args, "trace", sample),
    )(case.params, case.batch, weights)
    losses, grads = per_example(name)
    weighted = jax.tree.map(lambda g: np.einsum("i,i...->i...", weights, g), grads)
    norms = sum(np.sum(np.square(g), tuple(range(1, g.ndim))) for g in jax.tree.leaves(weighted))
    assert_close(sums.losses, losses)
    assert_close(sums.gradient, jax.tree.map(lambda g: g.sum(0), weighted))
    assert_close(sums.squares, norms)


def test_the_mean_is_that_of_the_gradients_measured():
    moments_of = gradient_moments(lambda w, x: jnp.sum(jnp.tanh(x @ w)))
    jaxpr = jax.make_jaxpr(moments_of)(jnp.ones((4, 3)), jnp.ones((8, 100, 4)))
    # The layer, the gradient of its input, and those of the examples, but not their mean beside.
    assert str(jaxpr).count("dot_general") == 3


@pytest.mark.slow
def test_terms_of_parameters_alone_shift_the_mean_but_not_the_squares():
    def loss(p, x):
        return jnp.sum(x * p) + jnp.sum(jnp.square(p))

    batch, p = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([5.0, -1.0])
    sums = batch_sums(
        loss_and_aux(loss, False), p, batch, jnp.ones(2), "trace", Sample(2, (), Target("cpu"))
    )
    np.testing.assert_allclose(sums.squares, [5.0, 25.0])
    np.testing.assert_allclose(sums.shift, 2 * (2 * p))  # of each of the two examples


@pytest.mark.slow
def test_checkpoint_saves_as_much_memory_as_in_the_plain_gradient():
    def layer(x, p):
        for _ in range(4):
            x = jnp.sin(jnp.tanh(x @ p["w"]) + jnp.broadcast_to(p["b"], x.shape))
        return x, None

    def deep(block):
        return lambda p, x: jnp.sum(jnp.square(lax.scan(block, x, p)[0]))

    def plain(loss):
        return jax.grad(lambda p, batch: jnp.mean(jax.vmap(loss, (None, 0))(p, batch)))

    params, batch = {"w": jnp.ones((8, 32, 32)), "b": jnp.ones((8, 32))}, jnp.ones((32, 32, 32))

    def saved(make):
        full, rematerialised = (
            jax.jit(make(deep(block))).lower(params, batch).compile().memory_analysis()
            for block in (layer, jax.checkpoint(layer))
        )
        return full.temp_size_in_bytes - rematerialised.temp_size_in_bytes

    assert saved(gradient_moments) > 0.95 * saved(plain) > 0
