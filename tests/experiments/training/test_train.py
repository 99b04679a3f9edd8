import json

import jax
import numpy as np
import pytest

from experiments.training import run_folder
from experiments.training.config import RunConfig
from experiments.training.train import set_up, train

pytestmark = pytest.mark.usefixtures("compilation_cache")


def run(out, **options):
    experiment = set_up(RunConfig(evaluations=3, **options))
    return train(experiment, out), run_folder.read(out)


OF_CABS = {"steps": 150, "learning_rate": 1.0, "max_batch_size": 32}


@pytest.fixture(scope="module")
def cabs_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("cabs"), **OF_CABS)


@pytest.mark.slow
def test_metrics_hold_one_line_a_step_with_exactly_the_documented_keys(cabs_run):
    _, record = cabs_run
    metrics = record.metrics
    assert list(metrics) == [
        "step",
        "batch_size",
        "loss",
        "gradient_variance",
        "learning_rate",
        "examples",
        "epoch",
        "seconds",
    ]
    np.testing.assert_array_equal(metrics["step"], np.arange(1, 151))
    np.testing.assert_array_equal(metrics["examples"], np.cumsum(metrics["batch_size"]))
    np.testing.assert_allclose(
        metrics["epoch"] * record.metrics["examples"][-1],
        metrics["examples"] * metrics["epoch"][-1],
    )
    assert set(metrics["learning_rate"]) == {1.0}
    assert np.all(np.diff(metrics["seconds"]) > 0)
    assert np.all(metrics["gradient_variance"] > 0)


@pytest.mark.slow
def test_the_batch_size_adapts_within_its_bounds(cabs_run):
    sizes = cabs_run[1].metrics["batch_size"]
    assert sizes[0] == 16
    assert sizes.min() >= 16
    assert len(set(sizes)) > 5


@pytest.mark.slow
def test_the_summary_repeats_the_last_step_and_evaluation(cabs_run):
    summary, record = cabs_run
    assert record.summary == summary
    assert summary["steps"] == 150
    assert summary["examples"] == record.metrics["examples"][-1]
    assert summary["seconds"] == record.metrics["seconds"][-1]
    assert summary["train_loss"] == record.evaluations["train_loss"][-1]
    assert summary["test_accuracy"] == record.evaluations["test_accuracy"][-1]
    assert not summary["diverged"]
    assert 1 <= summary["compilations"] <= 16
    assert 0 < summary["compile_seconds"] < summary["seconds"]


def test_evaluations_start_before_the_first_step_and_are_evenly_spread(cabs_run):
    evaluations = cabs_run[1].evaluations
    assert evaluations["step"].tolist() == [0, 50, 100, 150]
    assert evaluations["examples"][-1] == cabs_run[1].metrics["examples"][-1]
    assert evaluations["train_loss"][-1] < evaluations["train_loss"][0]
    assert evaluations["test_accuracy"][-1] > 0.5


@pytest.mark.slow  # trains whole runs
def test_equal_configurations_repeat_each_other_exactly(cabs_run, tmp_path):
    _, again = run(tmp_path / "again", **OF_CABS)
    for name, column in cabs_run[1].metrics.items():
        if name != "seconds":
            np.testing.assert_array_equal(again.metrics[name], column, err_msg=name)


@pytest.mark.slow  # trains whole runs
def test_methods_share_initial_parameters_and_order_of_examples(cabs_run, tmp_path):
    _, constant = run(tmp_path / "constant", method="constant", steps=3, learning_rate=1.0)
    np.testing.assert_allclose(constant.metrics["loss"][0], cabs_run[1].metrics["loss"][0], 1e-5)
    _, other_seed = run(tmp_path / "seed", steps=1, seed=1, learning_rate=1.0)
    assert other_seed.metrics["loss"][0] != cabs_run[1].metrics["loss"][0]


@pytest.mark.slow  # trains whole runs
def test_a_constant_size_compiles_once_and_stops_at_the_examples_asked_for(tmp_path):
    summary, record = run(tmp_path, method="constant", batch_size=100, examples=950)
    assert set(record.metrics["batch_size"]) == {100}
    assert summary["examples"] == 1000
    assert record.evaluations["examples"].tolist() == [0, 400, 700, 1000]
    assert summary["compilations"] == 1


@pytest.mark.slow  # trains whole runs
def test_bucketed_sizes_compile_once_a_size(tmp_path):
    summary, record = run(tmp_path, steps=40, learning_rate=1.0, round_to="buckets")
    assert summary["compilations"] <= len(set(record.metrics["batch_size"])) + 1


@pytest.mark.slow  # trains whole runs
def test_a_diverging_run_stops_and_is_recorded_as_such(tmp_path):
    summary, record = run(tmp_path, steps=100, learning_rate=3e38)
    assert summary["diverged"]
    assert summary["steps"] < 100
    assert np.isnan(record.metrics["loss"][-1])
    assert json.loads((tmp_path / run_folder.SUMMARY).read_text())["train_loss"] is None


@pytest.mark.slow
def test_every_line_is_on_disk_before_it_is_observed(tmp_path):
    lines = []

    def observe(metrics):
        lines.append(len((tmp_path / run_folder.METRICS).read_text().splitlines()))
        assert metrics["step"] == lines[-1]

    train(set_up(RunConfig(steps=3)), tmp_path, observe)
    assert lines == [1, 2, 3]


@pytest.mark.slow  # trains whole runs
def test_the_experiment_can_be_run_again(tmp_path):
    experiment = set_up(RunConfig(steps=2))
    before = jax.tree.map(np.array, experiment.model.params)
    train(experiment, tmp_path / "first")
    train(experiment, tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, before, experiment.model.params)


@pytest.mark.slow
def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(set_up(RunConfig(steps=1)), tmp_path)


@pytest.mark.slow  # trains whole runs
def test_with_lag_every_size_is_that_of_the_step_before_the_last(tmp_path):
    _, prompt = run(tmp_path / "prompt", steps=9, batch_size=64)
    _, late = run(tmp_path / "late", steps=9, batch_size=64, lag=1)
    np.testing.assert_array_equal(late.metrics["step"], prompt.metrics["step"])
    assert late.metrics["batch_size"][1] == late.metrics["batch_size"][0] == 64
    assert late.metrics["loss"][0] == prompt.metrics["loss"][0]
    assert late.metrics["batch_size"][2] == prompt.metrics["batch_size"][1] < 64
    np.testing.assert_array_equal(late.evaluations["step"], prompt.evaluations["step"])
