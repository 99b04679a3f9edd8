"""A step on a mesh, from the loader to the parameters, is the step on one device."""

import collections
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax
from experiments.benchmarks._collectives import collectives

STEPS = 4
LARGEST = 56  # whose eighths, as groups of "between", are consecutive examples on one device too
RANDOM = np.random.default_rng(0)
DATA = {
    "x": RANDOM.normal(size=(200, 8, 8, 2)).astype(np.float32),
    "y": RANDOM.normal(size=(200, 4)).astype(np.float32),
}
EXAMPLE_BYTES = sum(leaf[0].nbytes for leaf in DATA.values())


def array(*shape):
    return (RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def mlp(params, example):
    hidden = jnp.tanh(example["x"].reshape(-1) @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["out"] - example["y"]) ** 2)


def conv(params, example):
    hidden = example["x"][None]
    for name in ("first", "second"):
        hidden = jax.lax.conv_general_dilated(
            hidden, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        hidden = jnp.tanh(hidden)
    return jnp.mean((hidden.reshape(-1) @ params["out"] + params["b"] - example["y"]) ** 2)


NETS = {
    # Of each shard, too, a row has the 16 numbers that squares are added up by.
    "mlp": (mlp, {"w": array(128, 64), "b": array(1, 64)[0], "out": array(64, 4)}),
    "conv": (
        conv,
        {
            "first": array(3, 3, 2, 8),
            "second": array(3, 3, 8, 8),
            "out": array(32, 4),
            "b": array(1, 4)[0],
        },
    ),
}


class Layout(NamedTuple):
    """A mesh, its axis types, and which of its axes split a dimension of each parameter."""

    shape: dict[str, int]
    axis_type: AxisType = AxisType.Auto
    parameters: str | None = None
    tell_the_mesh: bool = False
    in_shard_map: bool = False


LAYOUTS = {
    "auto": Layout({"data": 8}),
    "auto, mesh=": Layout({"data": 8}, tell_the_mesh=True),
    "explicit": Layout({"data": 8}, AxisType.Explicit),
    "shard_map": Layout({"data": 8}, in_shard_map=True),
    "FSDP": Layout({"data": 4, "model": 2}, parameters="data"),
    "FSDP, mesh=": Layout({"data": 4, "model": 2}, parameters="data", tell_the_mesh=True),
    "tensor": Layout({"data": 4, "model": 2}, parameters="model"),
    "tensor, mesh=": Layout({"data": 4, "model": 2}, parameters="model", tell_the_mesh=True),
}
# Path (a) holds the per-example gradients; the others are methods of path (b).
ESTIMATORS = ("path a", "factored", "per_example", "between")


def mesh_of(layout):
    names = tuple(layout.shape)
    axis_types = (layout.axis_type,) * len(names)
    return jax.make_mesh(tuple(layout.shape.values()), names, axis_types=axis_types)


def shard_parameters(params, mesh, axis):
    """Splits every parameter over the axis, along the last dimension that divides."""

    def sharding(parameter):
        spec = [None] * parameter.ndim
        divisible = [d for d, n in enumerate(parameter.shape) if axis and n % mesh.shape[axis] == 0]
        if divisible:
            spec[divisible[-1]] = axis
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(sharding, params)


def make_step(loss, optimizer, estimator, shards=1, **where):
    """`step(params, state, batch, mask) -> (params, state)`."""
    if estimator == "path a":
        gradients_of = cabs_jax.per_example_value_and_grad(loss, **where)
    else:
        groups = 8 // shards if estimator == "between" else None
        moments_of = cabs_jax.gradient_moments(loss, method=estimator, groups=groups, **where)

    def step(params, state, batch, mask):
        if estimator == "path a":
            losses, grads = gradients_of(params, batch)
            updates, state = optimizer.update(grads, state, params, value=losses, mask=mask)
        else:
            m = moments_of(params, batch, mask=mask)
            updates, state = optimizer.update(
                m.mean, state, params, value=m.value, gradient_variance=m.variance, count=m.count
            )
        return optax.apply_updates(params, updates), state

    return step


def optimizer_for(padded, **where):
    return cabs_jax.cabs(
        0.1,
        max_batch_size=LARGEST,
        decay=0.5,
        scale=16.0,
        round_to=1 if padded else (16, 32, LARGEST),
        **where,
    )


class Run(NamedTuple):
    """What a run gave."""

    sizes: list[int]
    losses: list[float]
    variances: list[float]
    params: dict[str, np.ndarray]


def train(step, params, state, padded, sharding=None):
    sizes, losses, variances = [], [], []
    pad_to = LARGEST if padded else None
    with cabs_jax.BatchLoader(DATA, 16, seed=1, sharding=sharding, pad_to=pad_to) as loader:
        for _ in range(STEPS):
            batch, mask = next(loader) if padded else (next(loader), None)
            sizes.append(int(loader.batch_size))
            params, state = step(params, state, batch, mask)
            loader.batch_size = cabs_jax.batch_size(state)
            losses.append(float(state.info.value))
            variances.append(float(state.info.gradient_variance))
    return Run(sizes, losses, variances, params)


@functools.cache
def on_one_device(net, estimator, padded):
    loss, params = NETS[net]
    optimizer = optimizer_for(padded)
    step = jax.jit(make_step(loss, optimizer, estimator))
    return train(step, params, optimizer.init(params), padded)


class MeshStep(NamedTuple):
    """A step on a mesh, compiled if it is always given the same shape, and what it starts from."""

    step: object
    params: dict[str, jax.Array]
    state: object
    sharding: NamedSharding


@functools.cache
def on_mesh(net, estimator, layout, padded):
    loss, params = NETS[net]
    layout = LAYOUTS[layout]
    mesh = mesh_of(layout)
    where, of_update = {}, {}
    if layout.in_shard_map:
        where["axis_name"] = "data"
        of_update = where if estimator == "path a" else {}
    # An Auto mesh does not show the shards to be compared, which "between" needs to be told of.
    elif layout.tell_the_mesh or (layout.axis_type == AxisType.Auto and estimator == "between"):
        where = {"mesh": mesh, "axis_name": "data"}
    shards = layout.shape["data"]
    optimizer = optimizer_for(padded, **of_update)
    step = make_step(loss, optimizer, estimator, shards, **where)
    if layout.in_shard_map:
        in_specs = (P(), P(), P("data"), P("data"))
        step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=P())
    shardings = shard_parameters(params, mesh, layout.parameters), NamedSharding(mesh, P())
    params, state = jax.device_put((params, optimizer.init(params)), shardings)
    step, split = jax.jit(step, out_shardings=shardings), NamedSharding(mesh, P("data"))
    if padded:
        batch = jax.tree.map(lambda x: x[:LARGEST], DATA)
        batch, mask = jax.device_put((batch, np.ones(LARGEST, bool)), split)
        step = step.lower(params, state, batch, mask).compile()
    return MeshStep(step, params, state, split)


QUICK = {
    ("conv", "factored", "auto"),
    ("mlp", "path a", "shard_map"),
    ("mlp", "factored", "FSDP, mesh="),
    ("mlp", "per_example", "auto, mesh="),
}
SLOW = {
    ("conv", "path a", "auto"),
    ("conv", "factored", "explicit"),
    ("mlp", "factored", "tensor"),
    ("mlp", "between", "auto"),
}


def cases(layouts, padding):
    for case in itertools.product(NETS, ESTIMATORS, layouts, padding):
        marks = []
        if case[:3] not in QUICK or case[3] != "padded":
            marks += [pytest.mark.slow]
            if case[:3] not in SLOW or case[3] != "padded":
                marks += [pytest.mark.exhaustive]
        yield pytest.param(*case[:3], case[3] == "padded", id="-".join(case), marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "estimator", "layout", "padded"), list(cases(LAYOUTS, ("padded", "exact")))
)
def test_a_mesh_gives_the_sizes_losses_and_parameters_of_one_device(net, estimator, layout, padded):
    expected = on_one_device(net, estimator, padded)
    assert len(set(expected.sizes)) > 1  # else equal sizes would show nothing
    step, params, state, sharding = on_mesh(net, estimator, layout, padded)
    run = train(step, params, state, padded, sharding)

    assert run.sizes == expected.sizes
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(run.variances, expected.variances, rtol=1e-4)
    for name, parameter in run.params.items():
        np.testing.assert_allclose(parameter, expected.params[name], rtol=1e-5, atol=1e-6)
        assert parameter.sharding.is_equivalent_to(params[name].sharding, parameter.ndim)


def sent_by(net, estimator, layout):
    """The collective operations of a step by name, and the bytes of each parameter."""
    sent = collections.defaultdict(list)
    for collective in collectives(on_mesh(net, estimator, layout, padded=True).step):
        sent[collective.operation].extend(collective.arrays)
    return sent, [parameter.nbytes for parameter in NETS[net][1].values()]


def without_scalars(sizes):
    scalars = [size for size in sizes if size <= 8]
    assert len(scalars) <= 8
    return sum(sizes) - sum(scalars)


REPLICATED = [name for name, layout in LAYOUTS.items() if not layout.parameters]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "estimator", "layout", "padded"), list(cases(REPLICATED, ["padded"]))
)
def test_a_step_sends_its_mean_gradient_once_and_a_few_scalars(net, estimator, layout, padded):
    sent, parameters = sent_by(net, estimator, layout)
    assert sent.keys() == {"all-reduce"}
    # Where the devices' shards do not show, all padding is filled with the batch's first example.
    fill = EXAMPLE_BYTES if (estimator, layout) == ("factored", "auto") else 0
    assert without_scalars(sent["all-reduce"]) == sum(parameters) + fill


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "estimator", "layout", "padded"), list(cases(["FSDP, mesh="], ["padded"]))
)
def test_sharded_parameters_are_gathered_and_examples_never(net, estimator, layout, padded):
    sent, parameters = sent_by(net, estimator, layout)
    assert sent.keys() == {"all-gather", "all-reduce"}
    assert set(sent["all-gather"]) <= set(parameters)
    assert sum(sent["all-gather"]) <= 2 * sum(parameters)
    assert without_scalars(sent["all-reduce"]) == sum(parameters)
