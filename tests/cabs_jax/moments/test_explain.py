"""The table that says what measuring each parameter costs."""

import jax
import jax.numpy as jnp
import pytest

from cabs_jax import explain
from tests.cabs_jax.moments.oracle import matches, names
from tests.cabs_jax.moments.zoo import ZOO


def first(batch):
    return jax.tree.map(lambda x: x[0], batch)


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_named_and_what_falls_back_says_why(name, capsys):
    case = ZOO[name]()
    rows = explain(case.loss, case.params, first(case.batch))
    printed = capsys.readouterr().out
    assert [row.parameter for row in rows] == [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(case.params)
    ]
    for path, row in zip(names(case.params), rows, strict=True):
        assert row.parameter in printed
        assert (row.form in {"small", "per example"}) == matches(path, case.held)
        if row.form == "per example":
            assert row.reason
            assert row.reason in printed
        if row.form not in {"unused", "mean only"}:
            assert row.extra_flops > 0
            assert row.bytes_per_example > 0


def test_shapes_suffice():
    def loss(p, x):
        return jnp.sum(x @ p)

    shapes = jax.ShapeDtypeStruct((8, 4), "f4"), jax.ShapeDtypeStruct((8,), "f4")
    (row,) = explain(loss, *shapes)
    assert row.form == "one position"
    assert row.shape == (8, 4)
    assert row.primitives == ("dot_general",)


def test_forms_follow_the_number_of_positions():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p))

    def form(positions):
        (row,) = explain(loss, jnp.ones((4, 3)), jnp.ones((positions, 4)))
        return row.form

    assert [form(1), form(2), form(100)] == ["one position", "Gram", "direct"]


def test_a_grouped_convolution_costs_what_its_groups_do():
    def loss(p, x):
        return jnp.sum(
            jnp.tanh(jax.lax.conv_general_dilated(x[None], p, (1,), "VALID", feature_group_count=2))
        )

    (row,) = explain(loss, jnp.ones((4, 2, 3)), jnp.ones((4, 50)))
    assert row.form == "direct"
    assert row.extra_flops == 3 * 2 * (2 * 3) * 2  # 3·groups·p·q


def test_diagonal_of_a_parameter_used_twice_is_held(capsys):
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p) @ p)

    arguments = jnp.ones((3, 3)), jnp.ones(3)
    assert explain(loss, *arguments)[0].form == "Gram"
    assert explain(loss, *arguments, variance="diagonal")[0].form == "per example"
    assert "2 uses" in capsys.readouterr().out


def test_aux_is_left_aside():
    (row,) = explain(lambda p, x: (jnp.sum(p * x), x), jnp.ones(3), jnp.ones(3), has_aux=True)
    assert row.form == "small"


def test_a_parameter_of_a_penalty_alone_moves_only_the_mean():
    def loss(p, x):
        return jnp.sum(p["used"] * x) + jnp.sum(p["penalised"] ** 2)

    params = dict.fromkeys(["penalised", "unused", "used"], jnp.ones(3))
    forms = [row.form for row in explain(loss, params, jnp.ones(3))]
    assert forms == ["mean only", "unused", "small"]


@pytest.mark.parametrize(
    ("loss", "params", "options", "error", "message"),
    [
        (lambda p, x: p * x, jnp.ones(3), {}, TypeError, r"scalar per example.*shape \(3,\)"),
        (lambda p, x: (p @ x, x), jnp.ones(3), {}, TypeError, "needs has_aux=True"),
        (lambda p, x: p @ x, jnp.ones(3), {"has_aux": True}, TypeError, "must return.*aux"),
        (lambda p, x: p @ x, jnp.ones(3), {"variance": "full"}, ValueError, "'full'"),
        (lambda p, x: (p @ x).real, jnp.ones(3, jnp.complex64), {}, TypeError, "complex"),
    ],
)
def test_what_cannot_be_measured_says_so(loss, params, options, error, message):
    with pytest.raises(error, match=message):
        explain(loss, params, jnp.ones(3), **options)
