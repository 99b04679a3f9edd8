"""Every machine's forms give the same numbers, and rounded products no wrong variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabs_jax import gradient_moments
from cabs_jax.moments.factored import outer_products
from tests.cabs_jax.moments.oracle import assert_close, expected, moments
from tests.cabs_jax.moments.zoo import ZOO

SOME = [
    "convolution_2d",
    "channels_first_convolution",
    "frames_in_the_batch_of_a_convolution",
    "grouped_and_dilated_convolution",
    "dense",
    "embedding_of_repeated_tokens",
    "embedding_as_output_head",
    "scan_over_time",
]


def check(name, platform, variance, **options):
    case = ZOO[name]()
    with jax.default_matmul_precision("highest"):
        measure = gradient_moments(case.loss, platform=platform, variance=variance, **options)
        moments = jax.jit(measure)(case.params, case.batch)
    assert_close(moments, expected(name, variance), case.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_forms_for_a_tpu_are_exact(name):
    check(name, "tpu", "trace")


@pytest.mark.slow
def test_the_diagonal_of_convolutions_in_pieces():
    check("convolution_2d", "tpu", "diagonal")


@pytest.mark.slow
def test_forms_for_a_gpu_are_exact():
    check("embedding_of_repeated_tokens", "gpu", "trace")


@pytest.mark.exhaustive
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_on_every_platform(name, platform, variance):
    check(name, platform, variance)


# Rounding, emulated: contractions at default precision see bfloat16 numbers.

EXAMPLES, POSITIONS, P, Q = 32, 24, 8, 6
EPSILON = 2.0**-9  # half the distance of two bfloat16 numbers


def bilinear(w, example):
    """A loss whose gradient is Σ_t x_t ⊗ c_t: its sites are measured in the direct form."""
    return jnp.sum((example["x"] @ w) * example["c"])


def cancelling(noise, positions=POSITIONS):
    """Examples that differ from each other by a small fraction only."""
    rng = np.random.default_rng(0)

    def around(*shape):
        return rng.normal(size=shape) * (1 + noise * rng.normal(size=(EXAMPLES, *shape)))

    x, c = around(positions, P), around(positions, Q)
    return {"x": x.astype(np.float32), "c": c.astype(np.float32)}


def in_bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


@pytest.fixture
def rounding_products(monkeypatch):
    exact = outer_products._einsum

    def rounded(formula, *operands, precision=outer_products.HIGHEST):
        if outer_products.is_default(precision):
            operands = [x.astype(jnp.bfloat16) for x in operands]
        return exact(formula, *operands, precision=precision)

    monkeypatch.setattr(outer_products, "_einsum", rounded)


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01, 0.001])
def test_rounding_moves_the_deviation_by_a_fraction_of_the_gradient(noise, rounding_products):
    batch, w = cancelling(noise), jnp.zeros((P, Q))
    x, c = batch["x"].astype(np.float64), batch["c"].astype(np.float64)
    exact = moments(np.zeros(EXAMPLES), np.einsum("btp,btq->bpq", x, c))
    largest = np.einsum("btp,btq->bpq", np.abs(x), np.abs(c))
    bound = 2.02 * EPSILON * np.sqrt(np.mean(np.sum(largest**2, axis=(1, 2))))
    found = jax.jit(gradient_moments(bilinear))(w, batch)
    assert abs(np.sqrt(found.variance) - np.sqrt(exact.variance)) <= bound
    # As independent errors do, these add their squares.
    assert abs(found.variance - exact.variance) <= bound**2 + 0.02 * exact.variance


@pytest.mark.slow
def test_a_mean_and_norms_that_round_apart_would_lose_a_small_variance(rounding_products):
    batch, w = cancelling(0.03), jnp.zeros((P, Q))
    g = np.einsum("btp,btq->bpq", batch["x"].astype(np.float64), batch["c"].astype(np.float64))
    rounded = np.einsum("btp,btq->bpq", *(in_bfloat16(batch[k]).astype(np.float64) for k in "xc"))
    apart = np.mean(np.sum(g**2, axis=(1, 2))) - np.sum(rounded.mean(0) ** 2)
    together = float(jax.jit(gradient_moments(bilinear))(w, batch).variance)
    assert abs(apart - g.var(0).sum()) > 10 * abs(together - g.var(0).sum())


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 3])
def test_on_a_tpu_norms_are_of_what_its_products_see(positions, rounding_products):
    batch, w = cancelling(1.0, positions), jnp.zeros((P, Q))
    found = jax.jit(gradient_moments(bilinear, platform="tpu"))(w, batch)
    rounded = np.einsum("btp,btq->bpq", in_bfloat16(batch["x"]), in_bfloat16(batch["c"]))
    norms = np.mean(np.sum(rounded**2, axis=(1, 2)))
    np.testing.assert_allclose(found.variance + np.sum(found.mean**2), norms, rtol=1e-5)
