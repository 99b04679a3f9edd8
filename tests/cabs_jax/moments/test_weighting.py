"""Weights of examples: moments of a ratio of sums, against their definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cabs_jax import GradientMoments, gradient_moments
from cabs_jax.moments.flops import flops
from cabs_jax.statistics import WeightSums
from tests.cabs_jax.moments.oracle import assert_close, per_example, with_garbage
from tests.cabs_jax.moments.test_gradient_moments import SOME
from tests.cabs_jax.moments.test_sharding import WAYS, mesh_of, place
from tests.cabs_jax.moments.zoo import EXAMPLES, ZOO

WEIGHTS = np.random.default_rng(3).integers(0, 40, EXAMPLES).astype(np.float32)
KEEP = np.arange(EXAMPLES) % 8 != 2
MORE = [*SOME, "merged_queries_keys_and_values", "odd_leaves"]
OPTIONS = {
    "factored": {},
    "per_example": {"method": "per_example"},
    "microbatches": {"microbatch_size": 8},
    "per_example in microbatches": {"microbatch_size": 8, "method": "per_example"},
}
trees = jax.tree.map

rng = np.random.default_rng(0)
W = np.array([3, 0, 1, 8, 2, 5, 1, 4], np.float32)
ROWS = (rng.normal(size=(8, 3)) + 1).astype(np.float32)


def linear(p, x):
    """A loss whose gradient is the example."""
    return jnp.dot(p, x)


def weighted(w, x):
    return np.tensordot(w, np.asarray(x, np.float64), 1) / w.sum()


def expected(name, w, variance="trace", square_mean=True):
    """Σwℓ/Σw, ḡ = Σwg/Σw, Σw²(g − ḡ)²/Σw², (Σw)²/Σw², and the sums, by their definition."""
    losses, grads = per_example(name)
    w = np.asarray(w, np.float64)
    mean = trees(lambda g: weighted(w, g), grads)
    spread = trees(lambda g, centre: weighted(w**2, (g - centre) ** 2), grads, mean)
    if variance == "trace":
        spread = sum(map(np.sum, jax.tree.leaves(spread)))
    count = np.round(w.sum() ** 2 / (w**2).sum())
    h = trees(lambda g: weighted(w**2, g), grads) if square_mean else None
    sums = WeightSums(w.sum(), (w**2).sum(), h)
    return GradientMoments(weighted(w, losses), mean, spread, count, weights=sums)


def measure(name, options, w=WEIGHTS, keep=KEEP):
    case = ZOO[name]()
    padded = with_garbage(case.batch, keep & (w > 0))
    function = jax.jit(gradient_moments(case.loss, **options))
    return function(case.params, padded, jnp.asarray(keep), weights=w)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
def test_the_factored_moments_are_those_of_their_definition(name, variance):
    m = measure(name, {"variance": variance})
    assert_close(m, expected(name, WEIGHTS * KEEP, variance), ZOO[name]().tolerance)


@pytest.mark.parametrize("way", OPTIONS)
def test_other_methods_and_blocks_give_the_same(way):
    m = measure("dense", OPTIONS[way] | {"variance": "diagonal"})
    assert_close(m, expected("dense", WEIGHTS * KEEP, "diagonal"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("way", OPTIONS)
def test_weights_over_the_zoo(name, way):
    m = measure(name, OPTIONS[way])
    assert_close(m, expected(name, WEIGHTS * KEEP), ZOO[name]().tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_weights_on_a_mesh_are_those_of_one_device(way):
    case, (kind, make) = ZOO["convolution_2d"](), WAYS[way]
    mesh = mesh_of(kind)
    placed = place(mesh, case.params, with_garbage(case.batch, KEEP), jnp.asarray(KEEP), WEIGHTS)
    if way.startswith("shard_map"):
        moments_of = gradient_moments(case.loss, axis_name="data")
        function = jax.shard_map(
            lambda params, batch, mask, w: moments_of(params, batch, mask, weights=w),
            mesh=mesh,
            in_specs=(P(), *[P("data")] * 3),
            out_specs=P(),
            check_vma=way == "shard_map that checks",
        )
        m = jax.jit(function)(*placed)
    else:
        m = jax.jit(make(case.loss, mesh, {}))(*placed[:3], weights=placed[3])
    assert_close(m, expected("convolution_2d", WEIGHTS * KEEP))


def test_weights_cost_one_product_more_for_each_layer():
    def loss(layers, x):
        for w in layers:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    layers, x, function = [jnp.ones((32, 32))] * 4, jnp.ones((64, 32)), gradient_moments(loss)
    plain = flops(function, layers, x)
    weighted = flops(lambda *args: function(*args, weights=jnp.ones(64)), layers, x)
    products = 4 * 2 * 64 * 32 * 32
    assert products < weighted - plain < 1.15 * products


def test_weights_and_a_penalty():
    def loss(w, x):
        return jnp.dot(w, x) ** 2 + jnp.sum(w**2)

    def without(w, x):
        return jnp.dot(w, x) ** 2

    w = jnp.array([1.0, -2.0, 0.5])
    penalised, plain = (jax.jit(gradient_moments(f))(w, ROWS, weights=W) for f in (loss, without))
    shift = 2 * w
    assert_close(penalised.variance, plain.variance)
    assert_close(penalised.mean, plain.mean + shift)
    assert_close(penalised.weights.square_mean, plain.weights.square_mean + shift)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [*OPTIONS.values(), {"method": "between", "groups": 4}], ids=str
)
def test_equal_weights_change_nothing(options):
    case = ZOO["dense"]()
    function = jax.jit(gradient_moments(case.loss, **options))
    plain = function(case.params, case.batch, jnp.asarray(KEEP))
    equal = function(case.params, case.batch, jnp.asarray(KEEP), weights=np.full(EXAMPLES, 7))
    assert_close(equal._replace(weights=None), plain)
    assert equal.count.dtype == plain.count.dtype


@pytest.mark.parametrize("variance", ["trace", "diagonal"])
@pytest.mark.parametrize("real", [8, 5, 4])
def test_between_groups_is_its_formula(variance, real):
    keep = np.arange(8) < real
    function = gradient_moments(linear, method="between", groups=4, variance=variance)
    padded = np.where(keep[:, None], ROWS, np.nan)
    m = jax.jit(function)(jnp.ones(3), padded, jnp.asarray(keep), weights=W)
    w, groups = np.float64(W * keep), np.split(np.arange(8), 4)
    groups = [k for k in groups if w[k].sum() > 0]
    total, squares = w.sum(), (w**2).sum()
    mean = weighted(w, ROWS)
    within = sum(w[k].sum() * weighted(w[k], ROWS[k]) ** 2 for k in groups) - total * mean**2
    freedom = sum((w[k] ** 2).sum() / w[k].sum() for k in groups) - squares / total
    diagonal = within / freedom * (1 - squares / total**2)
    assert_close(m.variance, diagonal.sum() if variance == "trace" else diagonal)
    assert_close(m.mean, mean)
    assert m.weights.square_mean is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["factored", "between"])
def test_the_variance_over_the_size_is_the_noise_of_the_mean(method):
    # Long examples have other gradients, so that the weight itself is noise.
    examples, repetitions = 64, 4000
    w = rng.integers(1, 10, (repetitions, examples)).astype(np.float32)
    x = rng.normal(size=(repetitions, examples, 2)) + 0.3 * w[..., None]
    options = {"method": "between", "groups": 8} if method == "between" else {}
    function = gradient_moments(linear, **options)
    m = jax.jit(jax.vmap(lambda x, w: function(jnp.ones(2), x, weights=w)))(jnp.float32(x), w)
    noise = np.var(np.asarray(m.mean, np.float64), axis=0).sum()
    size = np.asarray(m.weights.total, np.float64) ** 2 / m.weights.squares
    np.testing.assert_allclose(np.mean(m.variance / size), noise, rtol=0.06)
    assert np.all(np.abs(m.count - size) <= 0.5)


def test_the_size_is_that_of_equal_examples_of_the_same_total():
    w = np.array([5.0, 5.0, 5.0, 0.0])
    m = jax.jit(gradient_moments(linear))(jnp.ones(3), ROWS[:4], weights=w.astype(np.float32))
    assert m.count == 3
    one = jax.jit(gradient_moments(linear))(jnp.ones(3), ROWS[:2], weights=jnp.array([9, 0]))
    assert one.count == 1
    np.testing.assert_allclose(one.variance, 0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"method": "per_example"}, {"microbatch_size": 4}])
def test_weights_of_zero_are_padding(options):
    padded = np.where(W[:, None] > 0, ROWS, np.nan)
    function = jax.jit(gradient_moments(linear, **options))
    m = function(jnp.ones(3), padded, weights=W)
    assert_close(m, function(jnp.ones(3), ROWS, weights=W))
    for leaf in jax.tree.leaves(function(jnp.ones(3), padded, weights=0 * W)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.slow
def test_averaged_weights_and_keys_know_the_weights():
    def loss(p, x, key):
        return jnp.dot(p, x) + jax.random.uniform(key)

    function = jax.jit(gradient_moments(loss))
    key, p = jax.random.key(0), jnp.ones(3)
    m = function(p, ROWS, weights=W, rng=key, averaged_params=p)
    kept = function(p, ROWS[W > 0], weights=W[W > 0], rng=key)
    np.testing.assert_allclose(m.value, kept.value, rtol=1e-5)
    np.testing.assert_allclose(m.averaged_value, m.value, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_weight_that_is_none_shows_in_all_results(bad):
    m = jax.jit(gradient_moments(linear))(
        jnp.ones(3), ROWS, weights=W + np.where(W == 8, bad - 8, 0)
    )
    assert np.isnan(m.value)
    assert np.isnan(m.variance)
    assert np.all(np.isnan(m.mean))


WRONG = {
    "list": ([1.0] * 8, TypeError, "weights must be an array .* got list"),
    "mask": (jnp.ones(8, bool), TypeError, "got bool.* is a mask"),
    "shape": (jnp.ones((8, 1)), ValueError, r"shape \(8,\) .* got \(8, 1\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_things_than_weights_are_refused(name):
    weights, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        gradient_moments(linear)(jnp.ones(3), ROWS, weights=weights)


def test_without_weights_the_tree_is_what_it_was():
    m = jax.eval_shape(gradient_moments(linear), jnp.ones(3), ROWS)
    assert m.weights is None
    assert len(jax.tree.leaves(m)) == 4
