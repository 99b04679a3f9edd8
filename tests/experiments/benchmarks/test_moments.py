import json
import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.benchmarks import _exact, _nets, _report, _timing

TINY = {
    "mlp": partial(_nets.mlp, (12, 8, 8, 10)),
    "residual_cnn": partial(_nets.residual_cnn, width=8, size=8),
    "transformer": partial(_nets.transformer, layers=2, width=16, length=8, heads=2),
}


@pytest.fixture
def tiny_nets(monkeypatch):
    for name, net in TINY.items():
        monkeypatch.setitem(_nets._NETS, name, net)


def check(models, columns, tmp_path, capsys):
    out, sizes = tmp_path / "out.json", (8, 40)
    options = ["--quick", "--models", *models, "--batches", "8", "40", "--columns", *columns]
    assert cli.main(["bench", "moments", *options, "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert {(cell["model"], cell["batch_size"], cell["column"]) for cell in cells} == {
        (model, size, column)
        for model in models
        for size in sizes
        for column in ("plain", *columns)
        if column != "subsample" or size > 32
    }
    for cell in cells:
        assert cell["time_ratio"] > 0
        assert cell["memory_ratio"] > 0
        assert cell["flops_ratio"] >= 1
        if cell["column"] == "subsample":
            assert 1e-5 < cell["variance_error"] < 1
        elif cell["column"] != "plain":
            assert cell["variance_error"] < 1e-5
            assert cell["mean_error"] < 1e-5
    printed = capsys.readouterr().out
    for model in models:
        assert printed.count(f"| {model}") == len(sizes)
    assert "geometric mean" in printed.splitlines()[-1]


@pytest.mark.slow  # compiles a net once for every column
def test_table_and_json_have_every_cell_with_small_errors(tiny_nets, tmp_path, capsys):
    check(["mlp"], ["per_example", "trace", "diagonal", "subsample"], tmp_path, capsys)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["residual_cnn", "transformer"])
def test_convolutions_and_scanned_layers_are_measured(model, tiny_nets, tmp_path, capsys):
    check([model], ["trace"], tmp_path, capsys)


@pytest.mark.slow  # compiles a net once for every column
def test_programs_that_need_too_much_memory_are_not_run(tiny_nets, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--models", "mlp", "--batches", "8", "--memory", "0", "--out", str(out)]
    assert cli.main(["bench", "moments", *options]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 4
    assert all(cell["seconds"] is None for cell in cells)
    assert all(cell["temporary_bytes"] > 0 for cell in cells)
    assert "not measured" in capsys.readouterr().out


def test_exact_moments_are_those_of_least_squares():
    random = np.random.default_rng(0)
    x, w = random.normal(size=(6, 3)).astype(np.float32), random.normal(size=3)
    exact = _exact.moments(lambda w, x: 0.5 * jnp.dot(w, x) ** 2, jnp.asarray(w), x, [2, 6])
    x = x.astype(np.float64)
    gradients = (x @ w.astype(np.float32))[:, None] * x
    for m, moments in exact.items():
        np.testing.assert_allclose(moments.mean, gradients[:m].mean(0), rtol=1e-6)
        np.testing.assert_allclose(moments.diagonal, gradients[:m].var(0), rtol=1e-6)
        np.testing.assert_allclose(moments.trace, gradients[:m].var(0).sum(), rtol=1e-6)
        assert moments.mean.dtype == np.float64


def test_contenders_take_turns_until_time_is_up(monkeypatch):
    monkeypatch.setattr(_timing, "SHORTEST", 0)
    monkeypatch.setattr(_timing, "PAUSE", 0)
    order = []
    contenders = {name: partial(order.append, name) for name in "ab"}
    times = _timing.alternate(contenders, rounds=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert _timing.alternate(contenders, rounds=3, seconds=0)["a"].__len__() == 1
    assert _timing.median_ratio([2, 3, 40], [1, 3, 2]) == 2


def test_milliseconds_and_markdown_line_up():
    assert [_report.milliseconds(s) for s in (0.0123, 1.5, 0.000123)] == [
        "12.3 ms",
        "1500 ms",
        "0.123 ms",
    ]
    lines = _report.markdown(["net", "m"], [["mlp", "16"], ["cnn", "2048"]]).splitlines()
    assert len(set(map(len, lines))) == 1
    assert math.prod(line.count("|") for line in lines) == 3**4
