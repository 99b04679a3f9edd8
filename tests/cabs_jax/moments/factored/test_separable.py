"""Linear functions of per-example arrays that are kept as products of factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import separable

EXAMPLES, SHAPE = 6, (5, 4)
RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


WEIGHTS, ROWS, FILTER, MASK = drawn(5, 4), drawn(5, 3), drawn(1, 3), drawn(5, 4) > 0


def norm_pulled_back(x):
    """What a division by the norm of each column pulls back."""
    return WEIGHTS * x - WEIGHTS * jnp.sum(WEIGHTS * x, axis=0, keepdims=True)


KEEPING = {
    "itself": lambda x: x,
    "scaled": lambda x: -(2 * x) / WEIGHTS,
    "differences": lambda x: WEIGHTS * x - x,
    "masked": lambda x: jnp.where(MASK, x, 0.0),
    "transposed": lambda x: x.T,
    "a sum along an axis": lambda x: jnp.sum(WEIGHTS * x, axis=0),
    "sums over all": lambda x: jnp.sum(x) * WEIGHTS,
    "repeated": lambda x: jnp.sum(lax.broadcast_in_dim(x, (5, 3, 4), (0, 2)), axis=(1, 2)),
    "axes of one": lambda x: jnp.squeeze(x[:, None, :], 1).reshape(1, 5, 4),
    "cut": lambda x: lax.slice(x, (1, 0), (5, 4), (2, 3)),
    "cut without strides": lambda x: lax.slice(lax.slice(x, (1, 2), (5, 4)), (1, 0), (3, 1)),
    "padded": lambda x: lax.pad(x, 0.0, [(1, 2, 1), (0, 0, 0)]),
    "repeated and padded": lambda x: lax.pad(
        lax.broadcast_in_dim(jnp.sum(x, axis=0), (2, 4), (1,)), 0.0, [(1, 0, 0), (0, 1, 2)]
    ),
    "product from the left": lambda x: ROWS.T @ x,
    "product from the right": lambda x: jnp.einsum("kj,kr->rj", x, ROWS),
    "product in step": lambda x: jnp.einsum("kj,kr->krj", x, ROWS),
    "outer product": lambda x: jnp.einsum("j,kr->krj", jnp.sum(x, axis=0), ROWS),
    "weight normalisation": norm_pulled_back,
    "jitted": lambda x: jax.jit(norm_pulled_back)(x),
}
WRITING_OUT = {
    "reshaped": lambda x: x.reshape(2, 10),
    "added up on the way": lambda x: jnp.cumsum(x, axis=0),
    "joined": lambda x: jnp.concatenate([x, 2 * x], axis=1),
    "transformed": lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * FILTER, 4),
    "solved": lambda x: jnp.linalg.solve(WEIGHTS.T @ WEIGHTS + jnp.eye(4), x.T),
}


def gradients(positions):
    """A sum of outer products for each example, as a product of factors, and written out."""
    left, right = drawn(EXAMPLES, positions, 5, 1), drawn(EXAMPLES, positions, 1, 4)
    return separable.Product((left, right), SHAPE), jnp.sum(left * right, axis=1)


def followed(function, products):
    closed, _ = jaxprs.trace(function, jnp.zeros(SHAPE))
    (found,) = separable.follow(closed.jaxpr, closed.consts, [products], jax.vmap)
    return found


@pytest.mark.parametrize("positions", [1, 2, 30])
@pytest.mark.parametrize("name", [*KEEPING, *WRITING_OUT])
def test_what_is_followed_is_what_is_mapped(name, positions):
    function = (KEEPING | WRITING_OUT)[name]
    product, arrays = gradients(positions)
    found, expected = followed(function, (product,)), jax.vmap(function)(arrays)
    np.testing.assert_allclose(separable.entries(found), expected, rtol=2e-5, atol=2e-5)
    axes = tuple(range(1, expected.ndim))
    norms = jnp.sum(jnp.square(expected), axes)
    np.testing.assert_allclose(separable.norms(found, EXAMPLES), norms, rtol=2e-4)
    squares = separable.square_sums(found, expected.shape[1:])
    wanted = jnp.sum(jnp.square(expected), axis=0)
    np.testing.assert_allclose(squares, wanted, rtol=2e-4, atol=1e-4 * float(jnp.max(wanted)))


@pytest.mark.parametrize("name", KEEPING)
def test_no_array_is_written_out_where_the_form_is_kept(name):
    product, _ = gradients(1)
    for one in followed(KEEPING[name], (product,)):
        for factor in one.factors:
            assert factor.ndim == len(one.shape) or factor.size <= EXAMPLES * max(
                one.shape, default=1
            )


def test_products_of_factors_along_the_same_axes_become_one():
    (one, first), (other, second) = gradients(2), gradients(3)

    def added(x, y):
        return WEIGHTS * (x + y)

    closed, _ = jaxprs.trace(added, jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    (found,) = separable.follow(closed.jaxpr, closed.consts, [(one,), (other,)], jax.vmap)
    assert len(found) == 1
    np.testing.assert_allclose(
        separable.entries(found), WEIGHTS[None] * (first + second), rtol=1e-4
    )


def test_two_times_the_same_is_kept_as_one():
    product, arrays = gradients(1)
    (found,) = followed(lambda x: WEIGHTS * x + WEIGHTS * x, (product,))
    assert any(factor is WEIGHTS for factor in found.factors)
    np.testing.assert_allclose(separable.entries((found,)), 2 * WEIGHTS[None] * arrays, rtol=1e-5)


def test_what_is_projected_away_is_not_below_zero():
    unit = WEIGHTS[:, :1] / jnp.linalg.norm(WEIGHTS[:, 0])
    along = (separable.Product((unit, drawn(EXAMPLES, 1, 1, 4)), SHAPE),)
    found = followed(lambda x: x - unit @ (unit.T @ x), along)
    norms = separable.norms(found, EXAMPLES)
    assert jnp.all((norms >= 0) & (norms < 1e-5))


def test_nothing_has_no_norm():
    assert separable.norms((), 3).tolist() == [0, 0, 0]
    assert separable.square_sums((), (2,)).tolist() == [0, 0]
