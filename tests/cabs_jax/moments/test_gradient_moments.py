"""What gradient_moments promises whatever the loss: masks and blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cabs_jax import gradient_moments
from tests.cabs_jax.moments.oracle import (
    assert_close,
    expected,
    per_example,
    with_garbage,
)
from tests.cabs_jax.moments.zoo import EXAMPLES, ZOO

SOME = [
    "dense",
    "convolution_2d",
    "embedding_as_output_head",
    "scan_over_time",
    "weight_norm",
    "cond_on_the_example",
]
EVERY_THIRD = np.arange(EXAMPLES) % 3 == 1
EXACT = ["factored", "per_example"]


def linear(p, x):
    """A loss whose gradient is the example."""
    return jnp.dot(p, x)


def with_aux(loss):
    return lambda p, e: (loss(p, e), {"double": 2 * loss(p, e), "example": e})


def member(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def run(name, *args, compiled=True, **options):
    case = ZOO[name]()
    function = gradient_moments(case.loss, **options)
    function = jax.jit(function) if compiled else function
    return function(case.params, case.batch, *args)


# The exact methods


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_per_example_moments_are_those_of_float64(name):
    moments = run(name, jnp.asarray(EVERY_THIRD), method="per_example")
    assert_close(moments, expected(name, keep=EVERY_THIRD), ZOO[name]().tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("block", [None, 4])
def test_exact_methods_over_the_zoo(name, variance, method, block):
    case = ZOO[name]()
    function = gradient_moments(case.loss, method=method, variance=variance, microbatch_size=block)
    padded, keep = with_garbage(case.batch, EVERY_THIRD), jnp.asarray(EVERY_THIRD)
    wanted = expected(name, variance, EVERY_THIRD)
    assert_close(jax.jit(function)(case.params, padded, keep), wanted, case.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("scan_over_time", marks=pytest.mark.slow), "odd_leaves"]
)
def test_eager_is_jit(name):
    assert_close(run(name, compiled=False), expected(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convolution_2d", {"microbatch_size": 4}),
        ("embedding_as_output_head", {}),
        ("merged_queries_keys_and_values", {}),
        ("masked_layers_of_a_scan", {}),
        ("weight_norm", {}),
        ("odd_leaves", {"method": "per_example"}),
    ],
    ids=str,
)
def test_variances_by_parameter_are_those_of_float64(name, options):
    case = ZOO[name]()
    measure = gradient_moments(case.loss, variance="by_parameter", **options)
    padded, keep = with_garbage(case.batch, EVERY_THIRD), jnp.asarray(EVERY_THIRD)
    m = jax.jit(measure)(case.params, padded, keep)
    assert_close(m, expected(name, "by_parameter", EVERY_THIRD), case.tolerance)


@pytest.mark.slow
def test_estimates_by_parameter_add_up_to_that_of_the_trace():
    case, groups = ZOO["odd_leaves"](), {"method": "between", "groups": 4}
    trace, parts = (
        jax.jit(gradient_moments(case.loss, variance=variance, **groups))(case.params, case.batch)
        for variance in ("trace", "by_parameter")
    )
    assert jax.tree.map(jnp.shape, parts.variance) == jax.tree.map(lambda _: (), parts.mean)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts.variance)), trace.variance, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME[:4])
def test_vmap_over_seeds(name):
    case = ZOO[name]()
    seeds = jax.tree.map(lambda p: np.stack([p, 0.5 * p, -p]), case.params)
    function = gradient_moments(case.loss)
    together = jax.jit(jax.vmap(function, (0, None)))(seeds, case.batch)
    compiled = jax.jit(function)
    for seed in range(3):
        alone = compiled(member(seeds, seed), case.batch)
        assert_close(member(together, seed), alone, 1e-5)


@pytest.mark.slow
def test_vmap_over_batches_and_masks():
    case = ZOO["convolution_2d"]()
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), case.batch)
    masks = jnp.stack([jnp.asarray(EVERY_THIRD), ~jnp.asarray(EVERY_THIRD)])
    function = jax.jit(jax.vmap(gradient_moments(case.loss), (None, 0, 0)))
    result = function(case.params, batches, masks)
    assert_close(member(result, 0), expected("convolution_2d", keep=EVERY_THIRD))
    assert_close(member(result, 1), expected("convolution_2d", keep=~EVERY_THIRD[::-1]))


@pytest.mark.slow
@pytest.mark.parametrize("method", EXACT)
def test_training_inside_scan(method):
    case = ZOO["dense"]()
    function = gradient_moments(case.loss, method=method)

    def step(params, _):
        m = function(params, case.batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, m.mean), m

    params, stacked = jax.jit(lambda p: lax.scan(step, p, length=3))(case.params)
    last = member(stacked, 2)
    previous = jax.tree.map(lambda p, g: p + 0.1 * g, params, last.mean)
    assert_close(last, jax.jit(function)(previous, case.batch))
    assert stacked.value[2] < stacked.value[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME[:3])
def test_value_and_mean_are_the_plain_ones(name):
    case = ZOO[name]()

    def mean_loss(params):
        return jnp.mean(jax.vmap(case.loss, (None, 0))(params, case.batch))

    value, grad = jax.jit(jax.value_and_grad(mean_loss))(case.params)
    m = run(name)
    assert_close((m.value, m.mean), (value, grad), 1e-5)


@pytest.mark.slow
def test_auto_is_exact():
    assert_close(run("dense", method="auto"), expected("dense"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", EXACT)
def test_statistics_of_half_precision_parameters_are_float32(dtype, method):
    # 1/4096 is lost when added to 1 in half precision.
    batch = 1 + jnp.array([[0.0], [1 / 64], [1 / 32], [3 / 64]], dtype)
    m = jax.jit(gradient_moments(linear, method=method))(jnp.ones(1, dtype), batch)
    assert m.mean.dtype == dtype
    assert m.value.dtype == m.variance.dtype == jnp.float32
    expected_variance = np.var(np.asarray(batch, np.float64))
    np.testing.assert_allclose(m.variance, expected_variance, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", EXACT)
def test_float64_parameters(method):
    def loss(p, x):
        return jnp.tanh(jnp.dot(p, x))

    with jax.enable_x64(True):
        p, batch = jnp.arange(3.0), jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        m = jax.jit(gradient_moments(loss, method=method))(p, batch)
        assert m.mean.dtype == jnp.float64
        assert m.variance.dtype == m.value.dtype == jnp.float32
        wanted = jax.vmap(jax.grad(loss), (None, 0))(p, batch)
        np.testing.assert_allclose(m.variance, wanted.var(0).sum(), rtol=1e-5)


@pytest.mark.parametrize("variance", ["trace", "diagonal"])
@pytest.mark.parametrize("method", EXACT)
def test_identical_examples_have_no_variance(variance, method):
    batch = jnp.tile(jnp.array([3.1, -0.7]), (5, 1))
    m = jax.jit(gradient_moments(linear, method=method, variance=variance))(jnp.ones(2), batch)
    assert jnp.all(m.variance >= 0)
    np.testing.assert_allclose(m.variance, 0, atol=1e-5)


@pytest.mark.parametrize("variance", ["trace", "by_parameter", "diagonal"])
@pytest.mark.parametrize("method", [*EXACT, "between"])
def test_squares_that_overflow_are_infinite(method, variance):
    def loss(p, x):
        return 1e10 * jnp.sum(jnp.dot(x, p) * x[:, :2])

    # Products of factors overflow with either sign, and meet entries that are zero throughout.
    batch = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32) * np.float32(1e8)
    batch[:, :, 2] = 0
    options = {"groups": 2} if method == "between" else {}
    measure = gradient_moments(loss, method=method, variance=variance, **options)
    m = jax.jit(measure)(jnp.ones((3, 2)), batch)
    assert jnp.all(jnp.isfinite(m.mean))
    assert jnp.any(jnp.isinf(m.variance))
    assert not jnp.any(jnp.isnan(m.variance))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("has_aux", [False, True])
def test_keep_batch_dim_gives_the_loss_a_batch_of_one(method, has_aux):
    case = ZOO["dense"]()

    def loss(p, batch):
        assert jax.tree.leaves(batch)[0].shape[0] == 1
        losses = jax.vmap(case.loss, (None, 0))(p, batch)
        return (jnp.mean(losses), 2 * losses) if has_aux else jnp.mean(losses)

    function = gradient_moments(loss, method=method, keep_batch_dim=True, has_aux=has_aux)
    result = jax.jit(function)(case.params, case.batch)
    m, aux = result if has_aux else (result, None)
    assert_close(m, expected("dense"))
    if has_aux:
        np.testing.assert_allclose(aux, 2 * per_example("dense")[0][:, None], rtol=1e-5)


@pytest.mark.parametrize("method", [*EXACT, "between"])
@pytest.mark.parametrize("block", [None, 4])
def test_aux_comes_back_per_example_and_in_order(method, block):
    case = ZOO["dense"]()
    blocks = {"groups": 4} if method == "between" else {"microbatch_size": block}
    function = gradient_moments(with_aux(case.loss), method=method, has_aux=True, **blocks)
    m, aux = jax.jit(function)(case.params, case.batch)
    wanted = expected("dense")
    assert_close((m.value, m.mean), (wanted.value, wanted.mean))
    np.testing.assert_array_equal(aux["example"], case.batch)
    np.testing.assert_allclose(aux["double"], 2 * per_example("dense")[0], rtol=1e-5)


# Masks and blocks


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 4}], ids=str)
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
def test_an_empty_mask_gives_zeros(options, variance):
    case = ZOO["embedding_as_output_head"]()
    padded = with_garbage(case.batch, np.zeros(EXAMPLES, bool))
    function = gradient_moments(case.loss, variance=variance, **options)
    zeros = jax.jit(function)(case.params, padded, jnp.zeros(EXAMPLES, bool))
    for leaf in jax.tree.leaves(zeros):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("method", ["per_example", "between"])
def test_an_empty_mask_gives_zeros_by_other_methods(method):
    groups = {"groups": 2} if method == "between" else {}
    batch, mask = jnp.full((4, 3), jnp.nan), jnp.zeros(4, bool)
    function = jax.jit(gradient_moments(linear, method=method, **groups))
    for leaf in jax.tree.leaves(function(jnp.ones(3), batch, mask)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("method", EXACT)
def test_a_single_example_has_no_variance(method):
    mask = jnp.arange(4) == 2
    batch = jnp.where(mask[:, None], jnp.arange(12.0).reshape(4, 3), jnp.nan)
    m = jax.jit(gradient_moments(linear, method=method))(jnp.ones(3), batch, mask)
    assert int(m.count) == 1
    np.testing.assert_allclose(m.mean, batch[2])
    np.testing.assert_allclose(m.variance, 0, atol=1e-4)


@pytest.mark.parametrize("name", ["convolution_2d", "embedding_as_output_head", "odd_leaves"])
@pytest.mark.parametrize("block", [1, 8, EXAMPLES])
def test_microbatches_give_the_moments_of_the_batch(name, block):
    case = ZOO[name]()
    keep = np.arange(EXAMPLES) < 11
    padded = with_garbage(case.batch, keep)
    function = jax.jit(gradient_moments(case.loss, microbatch_size=block))
    assert_close(
        function(case.params, padded, jnp.asarray(keep)), expected(name, keep=keep), case.tolerance
    )


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("real", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3)])
def test_blocks_of_padding_at_the_end_are_skipped(method, real, blocks):
    seen = []

    def loss(p, x):
        # Without operands it is called once for all that are vmapped together.
        jax.debug.callback(lambda: seen.append(1))
        return jnp.dot(p, x)

    function = jax.jit(gradient_moments(loss, method=method, microbatch_size=4))
    function(jnp.ones(3), jnp.ones((12, 3)), jnp.arange(12) < real).value.block_until_ready()
    jax.effects_barrier()
    assert len(seen) == blocks


@pytest.mark.slow
def test_blocks_of_padding_are_skipped_within_the_shard_of_a_mesh():
    seen = []

    def loss(p, x):
        jax.debug.callback(lambda: seen.append(1))
        return jnp.dot(p, x)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), auto, devices=jax.devices()[:2])
    function = jax.jit(gradient_moments(loss, microbatch_size=8, mesh=mesh))
    real = 64 + 8  # all of the first shard, and one block of the second
    function(jnp.ones(3), jnp.ones((128, 3)), jnp.arange(128) < real).value.block_until_ready()
    jax.effects_barrier()
    assert len(seen) == 8 + 1


@pytest.mark.slow
def test_integer_parameters_have_no_gradient_by_any_method():
    def loss(p, x):
        return p["w"] @ x * p["power"]

    params = {"w": jnp.arange(3.0), "power": jnp.int32(2)}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    for method in EXACT:
        m = gradient_moments(loss, method=method)(params, batch)
        np.testing.assert_allclose(m.mean["w"], 2 * batch.mean(0), rtol=1e-5)
        assert m.mean["power"] is None
        np.testing.assert_allclose(m.variance, 4 * np.var(batch, 0).sum(), rtol=1e-5)


@pytest.mark.slow
def test_microbatches_bound_the_memory():
    case = ZOO["weight_norm"]()
    params = jax.tree.map(lambda p: np.tile(p, (16,) * p.ndim), case.params)

    def memory(examples, block):
        # Squares of entries that several positions add to take a gradient for every example.
        batch = np.ones((examples, 2, 5 * 16), np.float32)
        measure = gradient_moments(case.loss, variance="diagonal", microbatch_size=block)
        function = jax.jit(measure)
        return function.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    one_gradient = params["direction"].nbytes
    assert memory(64, 8) - memory(32, 8) < one_gradient
    assert memory(64, None) - memory(32, None) > 30 * one_gradient


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 4}, {"method": "per_example"}])
def test_the_loss_of_averaged_weights_on_what_the_mask_keeps(options):
    def loss_fn(params, example):
        return jnp.sum((params["w"] @ example) ** 2)

    rng = np.random.default_rng(0)
    params, averaged = ({"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)} for _ in range(2))
    batch = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    mask = jnp.arange(8) < 5
    measure = jax.jit(gradient_moments(loss_fn, **options))
    moments = measure(params, batch, mask, averaged_params=averaged)
    wanted = np.mean([loss_fn(averaged, example) for example in batch[:5]])
    np.testing.assert_allclose(moments.averaged_value, wanted, rtol=1e-5)
    plain = measure(params, batch, mask)
    assert plain.averaged_value is None
    np.testing.assert_allclose(plain.variance, moments.variance, rtol=1e-5)
    with pytest.raises(ValueError, match=r"averaged_params must be a tree like the parameters"):
        measure(params, batch, mask, averaged_params={"w": jnp.zeros(3)})
