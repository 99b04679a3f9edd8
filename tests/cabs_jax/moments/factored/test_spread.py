"""A product with a weight that is repeated or padded is one with the weight itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import distributed, spread

W = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
PICKED = np.array([1, 0, 1, 1])


def dots(closed):
    """Shapes of the operands of every product of a program."""
    return [
        tuple(v.aval.shape for v in equation.invars)
        for equation in closed.jaxpr.eqns
        if jaxprs.name(equation) == "dot_general"
    ]


SPREAD = [
    lambda w: jnp.repeat(w, 3, axis=0),
    lambda w: jnp.repeat(w, 2, axis=1).transpose(2, 0, 1),
    lambda w: jnp.tile(w, (2, 1, 2)),
    lambda w: jnp.pad(w, ((1, 0), (0, 2), (0, 0))),
    lambda w: jnp.repeat(jnp.pad(w, ((0, 0), (0, 1), (0, 0))), 2, axis=1),
    lambda w: w[PICKED],
    lambda w: jnp.take(w, PICKED, axis=1),
    lambda w: jnp.repeat(w, 2, axis=2).reshape(6, 8),
    lambda w: jnp.repeat(jnp.repeat(w, 2, axis=0), 2, axis=1).reshape(4, 6, 2, 2),
    lambda w: jnp.broadcast_to(w[:, None], (2, 5, 3, 4)).reshape(10, 12),
]


@pytest.mark.parametrize("of_weight", SPREAD)
@pytest.mark.parametrize("kept", ["first", "last", "left"])
def test_products_are_the_same_and_no_larger(of_weight, kept):
    u = of_weight(W)
    axis = u.ndim - 1 if kept == "first" else 0
    x = np.random.default_rng(1).normal(size=(5, u.shape[axis])).astype(np.float32)

    def product(w, x):
        operands = (of_weight(w), x) if kept == "left" else (x, of_weight(w))
        axes = ((axis,), (1,)) if kept == "left" else ((1,), (axis,))
        return lax.dot_general(*operands, (axes, ((), ())))

    closed, _ = distributed.trace(product, W, x)
    assert [math for shapes in dots(closed) for math in shapes if np.prod(math) == W.size]
    (y,) = jax.extend.core.jaxpr_as_fun(closed)(W, x)
    np.testing.assert_allclose(y, product(W, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "of_weight",
    [
        lambda w: jnp.pad(w, ((0, 0), (0, 1)), constant_values=1.0),
        lambda w: lax.pad(w, jnp.zeros((), w.dtype), [(0, 0, 0), (0, 0, 1)]),
        lambda w: w[PICKED[:1]],
        lambda w: jnp.repeat(w, 2, axis=0).reshape(2, 2, 4).reshape(4, 2, 2),
        lambda w: jnp.exp(jnp.repeat(w, 2, axis=0)),
        lambda w: w[jnp.argsort(w[0])[:2]],
        lambda w: jnp.take(w, np.array([0, 1, 5]), axis=0),
    ],
)
def test_what_does_more_than_repeat_or_pad_is_left_as_it_is(of_weight):
    w = W[0, :2]
    shape = jax.eval_shape(of_weight, w).shape

    def product(w, x):
        return jnp.tensordot(x, of_weight(w), [[1], [0]])

    closed, _ = distributed.trace(product, w, jnp.ones((5, shape[0])))
    assert [shapes[1] for shapes in dots(closed)] == [shape]


@pytest.mark.parametrize(
    ("function", "distinct"),
    [
        (lambda w: w[:, PICKED[:2]], True),
        (lambda w: w[np.ix_([1, 0], [2, 0])], True),
        (lambda w: w[np.array([0, -1]), np.array([1, -2])], True),
        (lambda w: w[PICKED], False),
        (lambda w: w[np.array([0, 1]), np.array([1, 1])], True),
        (lambda w: w[np.array([1, 1]), np.array([1, 1])], False),
        (lambda w: jnp.take(w, np.array([0, 7]), axis=0), False),
    ],
)
def test_entries_known_to_differ_are_promised_to(function, distinct):
    closed, _ = distributed.trace(lambda w, x: x * jnp.sum(function(w)), W[0], 1.0)
    promises = [
        bool(equation.params["unique_indices"])
        for equation in closed.jaxpr.eqns
        if jaxprs.name(equation) == "gather"
    ]
    assert promises == [distinct] or (not promises and not distinct)


def test_only_weights_are_worth_following():
    bias, weight = jnp.ones((1, 3)), jnp.ones((2, 3))
    assert not spread.spreads(jax.make_jaxpr(lambda b: jnp.tile(b, (4, 1)))(bias).eqns[0])
    assert spread.spreads(jax.make_jaxpr(lambda w: jnp.tile(w, (4, 1)))(weight).eqns[0])
