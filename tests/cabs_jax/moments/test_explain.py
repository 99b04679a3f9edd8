"""The table that says what measuring each parameter costs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cabs_jax import explain, gradient_moments
from cabs_jax.moments.flops import flops
from tests.cabs_jax.moments.oracle import is_floating, matches, names
from tests.cabs_jax.moments.zoo import ZOO
from tests.cabs_jax.moments.zoo.case import convolution, squares


def first(batch):
    return jax.tree.map(lambda x: x[0], batch)


@pytest.mark.slow  # together
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_named_and_what_falls_back_says_why(name, capsys):
    case = ZOO[name]()
    rows = explain(case.loss, case.params, first(case.batch))
    printed = capsys.readouterr().out
    floating = jax.tree.map(lambda p: p if is_floating(p) else None, case.params)
    assert [row.parameter for row in rows] == [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(floating)
    ]
    for path, row in zip(names(floating), rows, strict=True):
        assert row.parameter in printed
        assert (row.form in {"small", "per example"}) == matches(path, case.held)
        if row.form == "per example":
            assert row.reason
            assert row.reason in printed
        if row.form not in {"unused", "no gradient", "mean only"}:
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


def test_rows_that_are_looked_up_are_compared_with_a_copy_and_not_with_a_product():
    def loss(table, tokens):
        return jnp.sum(jnp.tanh(table[tokens]))

    (row,) = explain(loss, jnp.ones((9000, 8)), jnp.zeros(16, jnp.int32))
    assert row.form == "Gram"
    assert row.relative_flops > 16  # every row with every other, and one addition for each
    assert "16 of 9000×8" in row.reason
    assert row.bytes_per_example < 9000 * 4  # neither a gradient nor a one-hot vector


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
            jnp.tanh(lax.conv_general_dilated(x[None], p, (1,), "VALID", feature_group_count=2))
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


def test_two_uses_cost_a_product_for_every_pair_of_their_positions():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x[:3] @ p)) + jnp.sum(jnp.tanh(x[3:] @ p))

    (row,) = explain(loss, jnp.ones((64, 64)), jnp.ones((5, 64)))
    assert row.form == "Gram"
    assert row.extra_flops == (3 * 3 + 2 * 3 + 2 * 2) * (2 * (64 + 64) + 3)
    assert row.relative_flops == pytest.approx(row.extra_flops / (6 * 5 * 64 * 64))


def test_what_is_held_in_a_scan_is_compared_with_the_gradients_of_all_steps():
    def loss(p, x):
        return jnp.sum(lax.scan(lambda h, _: (jnp.tanh(h @ p), None), x, length=5)[0])

    (row,) = explain(loss, jnp.ones((3, 3)), jnp.ones(3), variance="diagonal")
    assert row.form == "per example"
    assert row.extra_flops == 3 * 9
    assert row.relative_flops == pytest.approx(27 / (5 * 6 * 9))  # 6·p·q of each step


def test_numbers_are_aligned_to_the_right(capsys):
    explain(lambda p, x: jnp.sum(jnp.tanh(x @ p)), jnp.ones((90, 80)), jnp.ones((5, 90)))
    header, row, total = capsys.readouterr().out.splitlines()[1:4]
    ends = [header.index(name) + len(name) for name in ("extra flops", "bytes/example")]
    assert all(line[end - 1].isdigit() for end in ends for line in (row, total))


def test_aux_is_left_aside():
    (row,) = explain(lambda p, x: (jnp.sum(p * x), x), jnp.ones(3), jnp.ones(3), has_aux=True)
    assert row.form == "small"


def test_a_parameter_of_a_penalty_alone_moves_only_the_mean():
    def loss(p, x):
        return jnp.sum(p["used"] * x) + jnp.sum(p["penalised"] ** 2)

    params = dict.fromkeys(["penalised", "unused", "used"], jnp.ones(3))
    forms = [row.form for row in explain(loss, params, jnp.ones(3))]
    assert forms == ["mean only", "unused", "small"]


def test_what_is_used_without_a_gradient_is_not_called_unused():
    def loss(p, x):
        return jnp.sum(p["used"] * x) + jnp.argmax(p["chosen"]) + jnp.sum(p["whole"]) * 0.0

    params = dict.fromkeys(["chosen", "unused", "used", "whole"], jnp.ones(3))
    forms = [row.form for row in explain(loss, params, jnp.ones(3))]
    assert forms == ["no gradient", "unused", "small", "mean only"]


def test_a_loss_that_cannot_be_vmapped_has_no_table(capsys):
    def loss(p, x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jnp.sum(p * x) * jax.pure_callback(lambda x: x.sum(), shape, x)

    messages = []
    for measure in (explain, lambda p_loss, p, x: gradient_moments(p_loss)(p, x[None])):
        with pytest.raises(NotImplementedError) as error:
            measure(loss, jnp.ones(3), jnp.ones(3))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert not capsys.readouterr().out


def test_form_and_target_are_named(capsys):
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p))

    shapes = jax.ShapeDtypeStruct((1024, 1024), "f4"), jax.ShapeDtypeStruct((128, 1024), "f4")
    forms = {name: explain(loss, *shapes, platform=name)[0].form for name in ("cpu", "tpu")}
    assert forms == {"cpu": "direct", "tpu": "Gram"}
    assert "on tpu, variance='trace'" in capsys.readouterr().out


NARROW, WIDE, STEPS = 24, 32, 10


def mlp(p, e):
    return squares(jnp.tanh(e["x"][0] @ p["w"]) @ p["v"])


def conv(p, e):
    image = e["x"].reshape(STEPS, 4, -1)
    return squares(convolution(jnp.tanh(convolution(image, p["filters"])), p["more"]))


def attention(p, e):
    q, k, v = jnp.split(e["x"] @ jnp.concatenate([p["q"], p["k"], p["w"]], axis=1), 3, axis=1)
    return squares(jax.nn.softmax(q @ k.T) @ v @ p["v"])


def gru(p, e):
    def step(h, x):
        r, z = jnp.split(jax.nn.sigmoid(x @ p["w2"] + h @ p["u2"]), 2)
        n = jnp.tanh(x @ p["w"] + r * (h @ p["u"]))
        return (1 - z) * n + z * h, None

    return squares(jax.lax.scan(step, jnp.zeros(WIDE), e["x"])[0])


def tied(p, e):
    return squares(jnp.tanh(p["table"][e["tokens"]] @ p["v"]) @ p["table"].T)


def computed(p, e):
    return squares(e["x"][0] @ jnp.exp(p["a"] @ p["b"]))


def masked(p, e):
    padded = jnp.pad(p["q"], ((0, 0), (1, 1)))
    return squares(e["x"] @ jnp.tril(p["w"])) + squares(e["x"][0] @ padded)


SHAPES = {
    "a": (NARROW, 4),
    "b": (4, WIDE),
    "filters": (3, 3, NARROW // 4, 16),
    "k": (NARROW, WIDE),
    "more": (3, 3, 16, 16),
    "q": (NARROW, WIDE),
    "table": (50, WIDE),
    "u": (WIDE, WIDE),
    "u2": (WIDE, 2 * WIDE),
    "v": (WIDE, WIDE),
    "w": (NARROW, WIDE),
    "w2": (NARROW, 2 * WIDE),
}


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["trace", "diagonal"])
@pytest.mark.parametrize("loss", [mlp, conv, attention, gru, tied, computed, masked])
def test_operations_are_those_of_the_program_within_a_factor(loss, variance):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}

    def batch(m):
        return {"x": jnp.ones((m, STEPS, NARROW)), "tokens": jnp.zeros((m, STEPS), jnp.int32)}

    def per_example(function):
        return (flops(function, params, batch(12)) - flops(function, params, batch(4))) / 8

    def mean(p, batch):
        return jnp.mean(jax.vmap(loss, (None, 0))(p, batch))

    plain = per_example(jax.grad(mean))
    counted = per_example(gradient_moments(loss, variance=variance)) - plain
    rows = explain(loss, params, first(batch(1)), variance=variance)
    extra = sum(row.extra_flops for row in rows)
    assert counted / 1.6 < extra < 1.6 * counted
    for row in rows:
        assert row.reason or not row.relative_flops > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("loss", [mlp, attention])
def test_operations_are_those_that_the_compiler_counts_within_a_factor(loss):
    params, m = {name: jnp.ones(shape) for name, shape in SHAPES.items()}, 8
    batch = {"x": jnp.ones((m, STEPS, NARROW))}

    def counted(function):
        return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"]

    plain = counted(jax.grad(lambda p, b: jnp.mean(jax.vmap(loss, (None, 0))(p, b))))
    extra = m * sum(row.extra_flops for row in explain(loss, params, first(batch)))
    assert (plain + extra) / 2 < counted(gradient_moments(loss)) < 2 * (plain + extra)


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
