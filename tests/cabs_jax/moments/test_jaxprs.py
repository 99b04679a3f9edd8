"""The little of JAX's less stable surface that is relied on."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cabs_jax.moments import jaxprs


def test_trace_keeps_the_structure_of_the_result():
    closed, tree = jaxprs.trace(lambda x: {"a": x, "b": (2 * x,)}, jax.ShapeDtypeStruct((3,), "f4"))
    assert jax.tree.unflatten(tree, [1, 2]) == {"a": 1, "b": (2,)}
    jaxpr, consts = jaxprs.open_jaxpr(closed)
    again, none = jaxprs.open_jaxpr(jaxpr)
    assert again == jaxpr
    assert not none
    assert list(consts) == []


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@pytest.mark.parametrize(
    ("function", "primitive"),
    [
        (lambda x: 2 * x, "mul"),
        (lambda x: jnp.sort(x), "sort"),
        (jax.jit(lambda x: jnp.sin(x)), "jit"),
        (jax.nn.relu, "custom_jvp_call"),
        (halved, "custom_vjp_call"),
        (jax.checkpoint(lambda x: jnp.sin(x)), "checkpoint"),
        (lambda x: lax.scan(lambda h, y: (h * y, h), x[0], x), "scan"),
        (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), "cond"),
    ],
)
def test_equations_are_evaluated_and_differentiated_as_by_jax(function, primitive):
    x = jnp.array([0.3, -1.0, 2.0])
    closed, tree = jaxprs.trace(function, x)

    def by_equations(x):
        known = {closed.jaxpr.invars[0]: x}
        for equation in closed.jaxpr.eqns:
            values = [v.val if jaxprs.is_literal(v) else known[v] for v in equation.invars]
            known |= dict(zip(equation.outvars, jaxprs.evaluate(equation, values), strict=True))
        return jax.tree.unflatten(tree, [known[v] for v in closed.jaxpr.outvars])

    names = {"jit": {"jit", "pjit"}, "checkpoint": jaxprs.CHECKPOINTS}.get(primitive, {primitive})
    assert any(jaxprs.contains(closed.jaxpr, name) for name in names)
    jax.tree.map(np.testing.assert_array_equal, by_equations(x), function(x))

    def total(f):
        return lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(x)))

    np.testing.assert_array_equal(jax.grad(total(by_equations))(x), jax.grad(total(function))(x))


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, jax.custom_vjp, jax.custom_jvp], ids=lambda w: w.__name__
)
def test_call_like_equations_name_their_jaxpr(wrap):
    def function(x):
        return jnp.sin(x) * 2

    wrapped = wrap(function)
    if wrap is jax.custom_jvp:
        wrapped.defjvp(lambda p, t: (function(*p), t[0]))
    if wrap is jax.custom_vjp:
        wrapped.defvjp(lambda x: (function(x), None), lambda _, g: (g,))
    closed, _ = jaxprs.trace(wrapped, 1.0)
    (equation,) = closed.eqns
    inner, _ = jaxprs.inner_jaxpr(equation)
    assert [jaxprs.name(e) for e in inner.eqns] == ["sin", "mul"]
    assert jaxprs.contains(closed.jaxpr, "sin")
    assert not jaxprs.contains(closed.jaxpr, "cos")


def test_scan_operands_are_split():
    def function(c, h, xs):
        return lax.scan(lambda h, x: (h + c * x, h), h, xs)

    closed, _ = jaxprs.trace(function, 1.0, 2.0, jnp.ones(3))
    (scan,) = [e for e in closed.eqns if jaxprs.name(e) == "scan"]
    assert jaxprs.split_scan(scan, ["c", "h", "xs"]) == (["c"], ["h"], ["xs"])
    assert {"jaxpr", "length", "reverse", "unroll"} <= scan.params.keys()


def test_varying_axes_inside_shard_map():
    seen = []

    def function(x, y):
        seen.append((jaxprs.varying_axes(x), jaxprs.varying_axes(y)))
        return x

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    jax.shard_map(function, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(
        jnp.ones(8), jnp.ones(8)
    )
    assert seen[0] == ({"data"}, frozenset())
    assert jaxprs.varying_axes(jnp.ones(3)) == frozenset()


@pytest.mark.parametrize(
    ("take", "start", "counts"),
    [
        (lambda w, i: w[i], 0, True),
        (lambda w, i: w[i], 1, True),
        (lambda w, i: w[:, i], 0, True),
        (lambda w, i: w[i], 2, False),  # the last step is beyond the end
        (lambda w, i: w[i, i], 0, False),
        (lambda w, i: w[i // 2], 0, False),
        (lambda w, i: w[3 - i], 0, False),
        (lambda w, i: lax.dynamic_slice_in_dim(w, i, 2), 0, False),
        (lambda w, i: lax.dynamic_slice_in_dim(2 * w, i, 1), 0, False),
    ],
)
def test_slices_that_a_loop_takes_in_turn(take, start, counts):
    def loop(w):
        stop = start + 3
        return lax.fori_loop(start, stop, lambda i, total: total + jnp.sum(take(w, i)), 0.0)

    (scan,) = jax.make_jaxpr(loop)(jnp.ones((4, 4))).eqns
    assert len(jaxprs.counted_slices(scan)) == counts


@pytest.mark.parametrize(
    ("kind", "platform"),
    [("cpu", "cpu"), ("TPU v5 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")],
)
def test_the_platform_of_a_mesh_is_told_by_the_kind_of_its_devices(kind, platform):
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(device_kind=kind))
    assert jaxprs.platform(mesh) == platform


def test_outputs_depend_on_inputs_through_calls():
    closed = jax.make_jaxpr(jax.jit(lambda x, y: (x, x + 1, x * y)))(1.0, 2.0)
    assert jaxprs.dependent(closed.jaxpr, [1]) == [False, False, True]
    without, used = jaxprs.needed(closed.jaxpr, [True, True, False])
    assert used == [True, False]
    assert len(without.outvars) == 2
