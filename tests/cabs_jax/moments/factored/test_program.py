"""Equations are sorted by what they depend on."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored.program import trace_program
from cabs_jax.moments.factored.sorted_loss import CONSTANT, EXAMPLE, Kind, Parameter


def traced(loss, params, *example_shape):
    return trace_program(loss, params, jnp.ones((1, *example_shape)))


def steps(body):
    for step in body.steps:
        yield step
        if step.inner is not None:
            yield from steps(step.inner)


def kinds(program):
    return {jaxprs.name(step.equation): step.kind for step in steps(program.body)}


def sites(program):
    return [
        (jaxprs.name(site.equation) if site.equation else None, sorted(leaves), site.scans)
        for site in program.sites
        for _, parameter in site.parameters
        for leaves in [parameter.leaves]
    ]


def test_a_site_is_where_parameters_meet_the_example():
    def loss(p, x):
        squared = jnp.square(p["a"])
        return jnp.sum(jnp.tanh(x @ p["w"].T) * squared)

    program = traced(loss, {"a": jnp.ones(2), "w": jnp.ones((2, 3))}, 3)
    assert sites(program) == [("dot_general", [1], ()), ("mul", [0], ())]
    product, scale = program.sites
    assert product.rule is not None
    assert product.parameters[0][1].view.axes == (((3, 1),), ((2, 3),))
    assert scale.rule is None
    assert scale.parameters[0][1].view is None
    assert kinds(program)["tanh"] is Kind.PLAIN


def test_origins_of_the_loss():
    program = traced(lambda p, x: jnp.sum(p * x), jnp.ones(3), 3)
    assert program.body.outputs == (EXAMPLE,)
    (origin, example) = program.body.inputs
    assert isinstance(origin, Parameter)
    assert example is EXAMPLE


@pytest.mark.parametrize(
    "hide", [lax.stop_gradient, lambda w: w.astype(jnp.int32), lambda w: jnp.argmax(w)]
)
def test_no_site_where_no_gradient_flows(hide):
    program = traced(lambda p, x: jnp.sum(x * hide(p)), jnp.ones(3), 3)
    assert program.sites == ()


def test_integer_parameters_are_constant():
    program = traced(lambda p, x: jnp.sum(x * p), jnp.arange(3), 3)
    assert program.body.inputs[0] is CONSTANT
    assert program.sites == ()


def test_parameters_of_several_leaves_are_traced_to_all_of_them():
    def loss(p, x):
        return jnp.sum(jnp.concatenate([p["a"], p["b"]]) * x)

    program = traced(loss, {"a": jnp.ones(1), "b": jnp.ones(2)}, 3)
    assert sites(program) == [("mul", [0, 1], ())]


def test_the_walk_goes_into_jit_checkpoint_and_scan():
    def loss(p, x):
        @jax.jit
        def first(x):
            return x @ p["w"]

        @jax.checkpoint
        def second(x):
            return jnp.sin(x @ p["v"])

        def body(x, w):
            return jnp.tanh(lax.scan(lambda x, _: (x @ w, None), x, None, length=2)[0]), None

        return jnp.sum(lax.scan(body, second(first(x)), p["ws"])[0])

    params = {"v": jnp.ones((3, 3)), "w": jnp.ones((3, 3)), "ws": jnp.ones((5, 3, 3))}
    program = traced(loss, params, 3)
    assert sorted(sites(program), key=str) == [
        ("dot_general", [0], ()),
        ("dot_general", [1], ()),
        ("dot_general", [2], (5, 2)),
    ]
    found = {step.kind for step in steps(program.body)}
    assert found >= {Kind.CALL, Kind.CHECKPOINT, Kind.SCAN}
    numbers = [step.site for step in steps(program.body) if step.kind is Kind.SITE]
    assert sorted(numbers) == list(range(len(program.sites)))
    (inner,) = [site for site in program.sites if site.scans == (5, 2)]
    view = inner.parameters[0][1].view
    assert view.looped == ((5, 9),)
    assert view.repeats == 2


def test_a_carry_that_comes_to_depend_on_the_example_does_so_from_the_start():
    def loss(p, x):
        def body(carry, _):
            _, second, steps = carry
            return (second * p, x, steps + 1), None

        (first, _, count), _ = lax.scan(body, (jnp.zeros(3), jnp.zeros(3), 0), None, length=3)
        return jnp.sum(first) * count

    program = traced(loss, jnp.ones(3), 3)
    (scan,) = [step for step in steps(program.body) if step.kind is Kind.SCAN]
    _, carry, _ = jaxprs.split_scan(scan.equation, scan.inner.inputs)
    assert [origin is EXAMPLE for origin in carry] == [True, True, False]


def test_a_parameter_that_starts_a_carry_is_a_use_of_it():
    def loss(p, x):
        return jnp.sum(lax.scan(lambda h, _: (jnp.tanh(h + x), None), p, None, length=3)[0])

    assert sites(traced(loss, jnp.ones(3), 3)) == [("scan", [0], ())]


def test_a_term_of_parameters_alone_is_no_site():
    def loss(p, x):
        return jnp.sum(x @ p) + jax.jit(lambda p: 0.1 * jnp.sum(jnp.square(p)))(p)

    program = traced(loss, jnp.ones((3, 2)), 3)
    assert sites(program) == [("dot_general", [0], ())]
    assert Kind.SHIFT in {step.kind for step in steps(program.body)}


def test_a_factor_of_parameters_alone_is_a_site():
    def loss(p, x):
        return jnp.square(jnp.sum(x) + jnp.sum(p))

    assert sites(traced(loss, jnp.ones(3), 3)) == [("add", [0], ())]


def test_what_no_output_needs_is_no_site():
    def loss(p, x):
        unused = jnp.tanh(p["w"] * x)
        return jnp.sum(jnp.tanh(x + p["b"])), {"of another": x, "first": unused[:0]}

    program = traced(loss, {"b": jnp.ones(3), "w": jnp.ones(3)}, 3)
    assert [leaves for _, leaves, _ in sites(program)] == [[1], [0]]
    program = traced(lambda p, x: loss(p, x)[0], {"b": jnp.ones(3), "w": jnp.ones(3)}, 3)
    assert [leaves for _, leaves, _ in sites(program)] == [[0]]
