"""Branches of a run's checkpoint, each of another constant size."""

import json

import jax
import numpy as np
import optax
import pytest

from experiments import cli
from experiments.commands import branch

RUN = ["run", "--width", "0.25", "--steps", "12", "--evaluations", "1", "--batch-size", "16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs by their methods, made when asked for."""
    made = {}

    def run(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("runs") / method
            words = ["--method", method, "--checkpoint-every-steps", "5"]
            assert cli.main([*RUN, *words, "--out", str(made[method])]) == 0
        return made[method]

    return run


@pytest.mark.slow
def test_branches_of_a_run_are_compared_with_the_first(runs, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["branch", str(runs("constant")), "--out", str(out), "--factors", "1", "2", "40"]
    words += ["--examples", "640", "--seeds", "0", "1", "--step", "11"]
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in (out / "branches.jsonl").read_text().splitlines()]
    assert [line["batch_size"] for line in lines] == [16, 32, 640]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1, 0.2, 4.0])
    assert lines[0]["relative_loss"] == 1
    assert lines[0]["kept"]
    assert not lines[2]["kept"]  # a single step, of forty times the length
    last = [
        json.loads((out / f"size-32-seed-{seed}" / "summary.json").read_text())["train_loss"]
        for seed in (0, 1)
    ]
    assert lines[1]["train_loss"] == pytest.approx(np.mean(last))
    assert (out / "branches.png").read_bytes().startswith(b"\x89PNG")
    assert "From step 10: sizes up to" in capsys.readouterr().out
    assert cli.main(words) == 2  # never into results that are there


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param("constant_momentum", optax.TraceState, marks=pytest.mark.exhaustive),
        pytest.param("cabs_momentum", optax.TraceState, marks=pytest.mark.exhaustive),
        ("cabs_adam", optax.ScaleByAdamState),
    ],
)
def test_what_a_direction_remembers_goes_on_in_a_branch(runs, method, kind):
    origin = branch.read(runs(method))
    assert origin.step == 12
    continued = branch.continued(origin, 2, 0.5, 100, 0)
    start = continued.optimizer.init(continued.model.params)
    saved, found = (
        [
            node
            for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
            if isinstance(node, kind)
        ]
        for state in (origin.state, start)
    )
    assert len(found) == 1
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    assert continued.config.learning_rate == pytest.approx(0.1 * 2**0.5)


@pytest.mark.slow
def test_the_noise_scale_is_that_of_float64(runs, monkeypatch):
    origin = branch.read(runs("constant"))
    monkeypatch.setattr(branch, "MEASURED_EXAMPLES", 130)
    monkeypatch.setattr(branch, "CHUNK", 50)
    data = origin.experiment.dataset.train
    rows = np.random.default_rng(0).permutation(len(data["label"]))[:130]
    batch = {name: array[rows] for name, array in data.items()}
    gradients = jax.vmap(jax.grad(origin.experiment.model.loss), (None, 0))(origin.params, batch)
    flat = np.concatenate(
        [np.asarray(g, np.float64).reshape(130, -1) for g in jax.tree.leaves(gradients)], axis=1
    )
    variance = flat.var(0, ddof=1).sum()
    norm = np.sum(flat.mean(0) ** 2) - variance / 130
    assert branch.noise_scale(origin) == pytest.approx(variance / norm, rel=1e-4)


def test_what_cannot_be_branched_is_told(tmp_path, capsys):
    for words, why in [
        ([str(tmp_path)], "is not the folder of a run"),
        (["x", "--factors", "1", "-2"], "factors must be positive and differ"),
        (["x", "--seeds", "1", "1"], "seeds must differ"),
        (["x", "--tolerance", "-1"], "tolerance must not be negative"),
    ]:
        assert cli.main(["branch", *words, "--out", str(tmp_path / "out")]) == 2
        assert why in capsys.readouterr().err
