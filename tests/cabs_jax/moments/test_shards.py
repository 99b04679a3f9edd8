"""Moments where every device holds parts of the parameters: equal, gathered only where used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import (
    check_loss,
    gradient_moments,
    per_example_gradient_norms,
    per_example_value_and_grad,
)
from cabs_jax.moments.jaxprs import name, subjaxprs
from cabs_jax.statistics import squares_of
from experiments.benchmarks._collectives import collectives
from tests.cabs_jax.moments.oracle import assert_close, expected, moments, per_example_of
from tests.cabs_jax.moments.zoo import EACH, EXAMPLES, ZOO

KEEP = np.arange(EXAMPLES) % 8 != 2
SOME = [
    "convolution_2d",
    "embedding_as_output_head",
    "layer_and_rms_norm",
    "merged_queries_keys_and_values",
    "masked_layers_of_a_scan",
    "scan_over_time",
    "weight_norm",
]
VARIANCES = ["trace", "by_parameter", "diagonal"]
RANDOM = np.random.default_rng(0)
LAYERS, WIDTH, EXAMPLES_OF_NET, VOCABULARY = 4, 32, 16, 8
NET = {
    "embedding": RANDOM.normal(size=(VOCABULARY, WIDTH)),
    "layers": {"w": RANDOM.normal(size=(LAYERS, WIDTH, WIDTH)) / 6, "b": np.ones((LAYERS, WIDTH))},
    "out": RANDOM.normal(size=(WIDTH, VOCABULARY)) / 6,
}
NET = jax.tree.map(lambda x: x.astype(np.float32), NET)
SPECS = {"embedding": P(None, "data"), "layers": P(None, "data"), "out": P("data")}
TOKENS = RANDOM.integers(0, VOCABULARY, size=(EXAMPLES_OF_NET, 5)).astype(np.int32)
WEIGHTS = np.arange(EXAMPLES_OF_NET).astype(np.float32)


def loss_fn(params, tokens, *, penalty=0.0, layer_of=lambda layer: layer):
    @layer_of
    def layer(x, p):
        return jnp.tanh(x @ p["w"] + p["b"][None]), None

    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    loss = jnp.mean(jax.nn.logsumexp(x @ params["out"], -1))
    return loss + penalty * jnp.sum(params["layers"]["w"] ** 2) if penalty else loss


penalised = functools.partial(loss_fn, penalty=0.1)
rematerialised = functools.partial(loss_fn, layer_of=jax.checkpoint)


def mesh_of(kind, shape=(8,), names=("data",)):
    size = int(np.prod(shape))
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[:size]
    )


def split_where_possible(mesh, params, axis="data"):
    """Specs that split the last dimension of every parameter that the devices divide."""

    def spec(x):
        fits = [d for d, n in enumerate(np.shape(x)) if n and n % mesh.shape[axis] == 0]
        return P(*[None] * fits[-1], axis) if fits else P()

    return jax.tree.map(spec, params)


def place(mesh, params, specs, *batch):
    """Splits the parameters as told, and the rest over the data axis."""
    shardings = jax.tree.map(
        lambda _, spec: NamedSharding(mesh, spec), params, jax.tree.broadcast(specs, params)
    )
    return jax.device_put(params, shardings), *jax.device_put(batch, NamedSharding(mesh, P("data")))


def options_for(kind, mesh, specs, **options):
    told = {"mesh": mesh, "axis_name": "data", "param_specs": specs}
    return options | (told if kind is AxisType.Auto else {})


def check(name, kind, variance):
    case, mesh = ZOO[name](), mesh_of(kind, (2,))
    specs = split_where_possible(mesh, case.params)
    params, batch, keep = place(mesh, case.params, specs, case.batch, jnp.asarray(KEEP))
    moments_of = gradient_moments(case.loss, **options_for(kind, mesh, specs, variance=variance))
    found = jax.jit(moments_of)(params, batch, keep)
    assert_close(found, expected(name, variance, KEEP), case.tolerance)
    for mean, param in zip(jax.tree.leaves(found.mean), jax.tree.leaves(params), strict=False):
        if mean.shape == param.shape:
            assert mean.sharding.is_equivalent_to(param.sharding, mean.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("name", [each for each in EACH if each.values[0] in SOME])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_moments_from_parts_are_those_of_one_device(name, kind):
    check(name, kind, "trace")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("variance", VARIANCES)
def test_moments_from_parts_over_the_zoo(name, kind, variance):
    check(name, kind, variance)


def measured(kind, loss=loss_fn, params=NET, keep=None, weights=None, averaged=None, **options):
    """The moments from parts, and the compiled program that gave them."""
    mesh = mesh_of(kind)
    placed, batch, keep, weights = place(mesh, params, SPECS, TOKENS, keep, weights)
    if averaged is not None:
        (averaged,) = place(mesh, averaged, SPECS)
    given = {"weights": weights, "averaged_params": averaged}
    moments_of = gradient_moments(loss, **options_for(kind, mesh, SPECS, **options))
    program = jax.jit(moments_of).lower(placed, batch, keep, **given).compile()
    return program(placed, batch, keep, **given), program


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


@pytest.mark.slow
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_kinds_of_variance_with_a_mask(variance):
    keep = np.arange(EXAMPLES_OF_NET) % 5 != 1
    found, _ = measured(AxisType.Explicit, keep=keep, variance=variance)
    wanted = moments(*per_example_of(loss_fn, NET, TOKENS), variance, keep)
    assert_close(found, wanted)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (penalised, {}),
        (penalised, {"weights": WEIGHTS}),
        (penalised, {"weights": WEIGHTS, "variance": "diagonal"}),
        (loss_fn, {"microbatch_size": 1, "variance": "by_parameter"}),
    ],
    ids=["penalty", "weights", "weights, diagonal", "microbatches"],
)
def test_options_give_what_they_give_on_one_device(kind, loss, options):
    found, _ = measured(kind, loss, **options)
    variance = options.get("variance", "trace")
    if "weights" in options:
        alone = gradient_moments(loss, variance=variance)
        assert_close(found, jax.jit(alone)(NET, TOKENS, weights=options["weights"]))
    else:
        assert_close(found, moments(*per_example_of(loss, NET, TOKENS), variance))


@pytest.mark.slow
@KINDS
def test_replicas_of_parts_and_axes_that_split_no_examples(kind):
    mesh = mesh_of(kind, (2, 2, 2), ("replica", "data", "model"))
    specs = SPECS | {"out": P("data", "model")} if kind is AxisType.Auto else SPECS
    batch_axes = ("replica", "data")
    params, _ = place(mesh, NET, specs, TOKENS)
    batch = jax.device_put(TOKENS, NamedSharding(mesh, P(batch_axes)))
    told = {"mesh": mesh, "axis_name": batch_axes, "param_specs": specs}
    options = told if kind is AxisType.Auto else {}
    found = jax.jit(gradient_moments(loss_fn, **options))(params, batch)
    assert_close(found, moments(*per_example_of(loss_fn, NET, TOKENS)))


@pytest.mark.slow
def test_half_precision_parameters_are_added_up_in_single():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), NET)
    found, _ = measured(AxisType.Auto, params=half)
    alone = jax.jit(gradient_moments(loss_fn))(half, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.mean)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(found.variance, alone.variance, rtol=0.02)


def mean_loss(params, batch):
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))


@KINDS
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 1}], ids=["at once", "microbatches"])
def test_averaged_weights_are_gathered_where_they_are_used(kind, options):
    averaged = jax.tree.map(lambda x: 2 * x, NET)
    found, program = measured(kind, rematerialised, averaged=averaged, **options)
    np.testing.assert_allclose(found.averaged_value, mean_loss(averaged, TOKENS), rtol=1e-5)
    wanted = moments(*per_example_of(loss_fn, NET, TOKENS))
    assert_close(found._replace(averaged_value=None), wanted)
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in program.as_text()


@pytest.mark.slow
def test_averaged_weights_may_be_whole_where_the_parameters_are_parts():
    mesh = mesh_of(AxisType.Explicit)
    params, batch = place(mesh, NET, SPECS, TOKENS)
    found = jax.jit(gradient_moments(loss_fn))(params, batch, averaged_params=NET)
    np.testing.assert_allclose(found.averaged_value, mean_loss(NET, TOKENS), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        gradient_moments(loss_fn, method="between", groups=1),
        gradient_moments(loss_fn, method="per_example"),
        per_example_gradient_norms(loss_fn),
        per_example_value_and_grad(loss_fn),
    ],
    ids=["between", "per example", "norms", "gradients"],
)
def test_what_needs_whole_parameters_gathers_parts(function):
    mesh = mesh_of(AxisType.Explicit)
    found, wanted = (jax.jit(function)(*place(mesh, NET, each, TOKENS)) for each in (SPECS, P()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.slow
def test_a_loss_is_checked_on_parts_of_parameters_and_batch():
    parts = place(mesh_of(AxisType.Explicit), NET, SPECS, TOKENS)
    check_loss(loss_fn, *parts, mean_loss)
    with pytest.raises(ValueError, match="the loss of the batch is"):
        check_loss(loss_fn, *parts, lambda params, batch: 2 * mean_loss(params, batch))


# What goes between the devices

# Bytes, of a layer where it is by itself; the gradients of biases are added up at the end.
W, B, TABLE = 4 * WIDTH * WIDTH, 4 * WIDTH, 4 * VOCABULARY * WIDTH
GATHERED, SCATTERED = [W, W, B, B, TABLE, TABLE], [W, LAYERS * B, TABLE, TABLE]


def sent_by(program):
    """Bytes of each array that is sent, by kind, those in the body of a loop once."""
    sent = {}
    for collective in collectives(program):
        sent.setdefault(collective.operation, []).extend(collective.arrays)
    return sent


@KINDS
def test_a_layer_is_gathered_twice_and_its_gradient_scattered_once(kind):
    _, program = measured(kind, rematerialised, platform="gpu")
    sent = sent_by(program)
    assert sorted(sent["all-gather"]) == sorted(GATHERED)
    assert sorted(sent["reduce-scatter"]) == sorted(SCATTERED)
    assert sum(sent["all-reduce"]) <= 32
    assert sent.keys() == {"all-gather", "reduce-scatter", "all-reduce"}


@KINDS
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_sums_are_scattered_as_they_are_added_up_except_on_cpu_where_that_goes_wrong(
    kind, platform
):
    found, program = measured(kind, platform=platform)
    assert ("reduce-scatter" in sent_by(program)) == (platform == "gpu")
    assert_close(found, moments(*per_example_of(loss_fn, NET, TOKENS), "trace"))


@pytest.mark.slow
def test_the_diagonal_is_scattered_like_the_gradient():
    _, program = measured(AxisType.Auto, rematerialised, variance="diagonal", platform="gpu")
    sent = sent_by(program)
    assert sum(sent["reduce-scatter"]) == 2 * sum(SCATTERED)
    assert sum(sent["all-reduce"]) <= 32


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss_fn, rematerialised])
def test_no_device_ever_holds_all_layers(loss):
    _, program = measured(AxisType.Auto, loss)
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in program.as_text()


def added_up(jaxpr):
    """Dtypes and sizes of the arrays that a program adds up over devices."""
    for equation in jaxpr.eqns:
        if name(equation) in {"psum", "psum_invariant", "reduce_scatter"}:
            yield from ((v.aval.dtype.name, v.aval.size) for v in equation.invars)
        for inner in subjaxprs(equation):
            yield from added_up(inner)


@pytest.mark.parametrize("specs", [SPECS, None], ids=["parts", "whole"])
@pytest.mark.parametrize("variance", ["trace", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_gradients_are_added_up_in_the_dtype_asked_for_and_nothing_else(specs, variance):
    mesh = mesh_of(AxisType.Auto)
    params, batch = place(mesh, NET, specs or P(), TOKENS)
    options = {"mesh": mesh, "param_specs": specs, "variance": variance}
    narrow = gradient_moments(penalised, reduce_dtype=jnp.bfloat16, **options)
    sent = list(added_up(jax.make_jaxpr(narrow)(params, batch).jaxpr))
    gradients = {dtype for dtype, size in sent if size > 1}
    assert gradients == ({"bfloat16"} if variance == "trace" else {"bfloat16", "float32"})
    assert "bfloat16" not in {dtype for dtype, size in sent if size == 1}
    found = jax.jit(narrow)(params, batch)
    wanted = moments(*per_example_of(penalised, NET, TOKENS), variance)
    for a, b in zip(jax.tree.leaves(found.mean), jax.tree.leaves(wanted.mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())
    # The variance is what squares exceed the mean's by, which was rounded.
    unpenalised = moments(*per_example_of(loss_fn, NET, TOKENS), variance)
    around = squares_of(unpenalised.mean, variance)
    jax.tree.map(
        lambda a, b, square: np.testing.assert_array_less(np.abs(a - b), 0.02 * (b + square)),
        *(found.variance, wanted.variance, around),
    )


# What is refused


def test_specs_go_with_a_mesh():
    with pytest.raises(ValueError, match=r"param_specs=.* goes with mesh="):
        gradient_moments(jnp.dot, param_specs=P("data"))


def test_specs_are_for_the_method_that_gathers_late():
    with pytest.raises(ValueError, match=r"param_specs=.*, got method='between'"):
        gradient_moments(
            jnp.dot, mesh=mesh_of(AxisType.Auto), param_specs=P("data"), method="between"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce_dtype": jnp.int32}, "reduce_dtype must be a floating-point dtype, got .*int32"),
        ({"reduce_dtype": "bfloat16", "method": "per_example"}, "is heeded with mesh="),
        ({"reduce_dtype": "bfloat16", "spmd_axis_name": "data"}, "is heeded with mesh="),
    ],
)
def test_a_dtype_to_add_up_in_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_moments(jnp.dot, **options)


def test_specs_fit_the_parameters():
    mesh = mesh_of(AxisType.Auto)
    moments_of = gradient_moments(jnp.dot, mesh=mesh, param_specs=P(None, "data"))
    with pytest.raises(ValueError, match=r"param_specs has .* for a parameter of shape \(8,\)"):
        moments_of(jnp.ones(8), jnp.ones((8, 8)))
