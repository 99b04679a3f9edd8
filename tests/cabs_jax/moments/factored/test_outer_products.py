"""Norms, squares and sums of outer products against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabs_jax.moments.factored import outer_products

EXAMPLES, P, Q = 6, 5, 3


def factors(seed, positions, groups=1, one_hot=False, swapped=False):
    random = np.random.default_rng(seed)
    p, q = (Q, P) if swapped else (P, Q)
    right = random.normal(size=(EXAMPLES, groups, positions, q))
    if one_hot:
        left = random.integers(0, p, (EXAMPLES, positions))
        return jnp.asarray(left, jnp.int32), jnp.asarray(right, jnp.float32)
    left = random.normal(size=(EXAMPLES, groups, positions, p))
    return jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)


def outer(factors):
    left, right = (np.asarray(f) for f in factors)
    if left.ndim == 2:
        left = np.eye(P)[left][:, None]
    return np.einsum("bktp,bktq->bkpq", left.astype(np.float64), right.astype(np.float64))


KINDS = [
    {"positions": 1},
    {"positions": 1, "groups": 4},
    {"positions": 7},
    {"positions": 7, "groups": 2},
    {"positions": 1, "one_hot": True},
    {"positions": 7, "one_hot": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_and_their_norms_and_squares(kind):
    both, g = factors(0, **kind), outer(factors(0, **kind))
    np.testing.assert_allclose(
        jax.jit(lambda f: outer_products.gradients(f, P))(both), g, rtol=1e-5, atol=1e-6
    )
    norms = np.sum(g**2, axis=(1, 2, 3))
    np.testing.assert_allclose(jax.jit(outer_products.gram_norms)([both]), norms, rtol=1e-5)
    if kind["positions"] == 1 and "one_hot" not in kind:
        np.testing.assert_allclose(
            jax.jit(outer_products.square_sums)(both), np.sum(g**2, axis=0), rtol=1e-5
        )


@pytest.mark.parametrize("positions", [1, 7, 40])
def test_rows_that_go_to_one_place_are_added_up_by_sorting_as_by_comparing(positions):
    both = factors(0, positions, one_hot=True)
    g = outer(both)
    norms = jax.jit(lambda f: outer_products.one_hot_norms(f, apart=False, by_sorting=True))(both)
    np.testing.assert_allclose(norms, np.sum(g**2, axis=(1, 2, 3)), rtol=1e-5)
    for by_sorting in (False, True):
        squares = outer_products.one_hot_square_sums(both, P, apart=False, by_sorting=by_sorting)
        np.testing.assert_allclose(squares, np.sum(g**2, axis=0), rtol=1e-5)


def multiples(positions, scale=1.0, seed=0):
    """Places, and rows that are multiples of one vector for each example, some of them zero."""
    random = np.random.default_rng(seed)
    number = (
        random.normal(size=(EXAMPLES, 1, positions, 1)) * (random.random(positions) < 0.8)[:, None]
    )
    number[0] = 0.0
    right = scale * number * random.normal(size=(EXAMPLES, 1, 1, Q))
    return factors(seed, positions, one_hot=True)[0], jnp.asarray(right, jnp.float32)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_one_vector_is_taken_out_of_rows_that_are_multiples_of_it(scale):
    left, right = multiples(7, scale)
    (same, numbers), vector = jax.jit(outer_products.narrowed)((left, right))
    assert same.shape == left.shape
    np.testing.assert_allclose(numbers * vector, right, rtol=1e-6)
    lengths = np.linalg.norm(vector, axis=3)
    np.testing.assert_allclose(lengths, np.any(right, axis=(1, 2, 3))[:, None, None], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_leave_no_finite_multiples(bad):
    left, right = multiples(7)
    (_, numbers), _ = outer_products.narrowed((left, right.at[1, 0, 2, 0].set(bad)))
    finite = np.all(np.isfinite(numbers), axis=(1, 2, 3))
    np.testing.assert_array_equal(finite, np.arange(EXAMPLES) != 1)


@pytest.mark.parametrize("positions", [1, 7, 40])
@pytest.mark.parametrize("form", [{}, {"by_sorting": True}, {"in_table": True}], ids=str)
def test_squares_of_pooled_rows(form, positions):
    both = multiples(positions)
    form = {"in_table": False} | form
    squares = jax.jit(lambda f: outer_products.pooled_square_sums(f, P, **form))(both)
    np.testing.assert_allclose(squares, np.sum(outer(both) ** 2, axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    "kinds",
    [(KINDS[0], KINDS[2]), (KINDS[5], KINDS[2]), (KINDS[2], KINDS[5]), (KINDS[5], KINDS[4])],
    ids=str,
)
def test_norms_of_a_sum_of_uses_hold_the_cross_terms(kinds):
    uses = [factors(i, **kind) for i, kind in enumerate((*kinds, kinds[0]))]
    g = sum(map(outer, uses))
    norms = np.sum(g**2, axis=(1, 2, 3))
    np.testing.assert_allclose(jax.jit(outer_products.gram_norms)(uses), norms, rtol=1e-5)


@pytest.mark.slow
def test_results_of_half_precision_factors_are_float32():
    left, right = (f.astype(jnp.bfloat16) for f in factors(0, 7))
    g = outer((left.astype(jnp.float32), right.astype(jnp.float32)))
    for result, wanted in (
        (outer_products.gradients((left, right), P), g),
        (outer_products.gram_norms([(left, right)]), np.sum(g**2, axis=(1, 2, 3))),
        (outer_products.square_sums((left[:, :, :1], right[:, :, :1])), None),
    ):
        assert result.dtype == jnp.float32
        if wanted is not None:
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float64", "float64")])
def test_factors_of_any_two_types_contract_in_float32(dtypes):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        left, right = (f.astype(d) for f, d in zip(factors(0, 7), dtypes, strict=True))
        norms = outer_products.gram_norms([(left, right)])
        assert norms.dtype == jnp.float32
        g = outer((left.astype(jnp.float32), right.astype(jnp.float32)))
        np.testing.assert_allclose(norms, np.sum(g**2, axis=(1, 2, 3)), rtol=1e-5)
