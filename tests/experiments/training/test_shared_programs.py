import json

import numpy as np
import pytest

from experiments.training import run_folder
from experiments.training.config import RunConfig
from experiments.training.shared_programs import SharedPrograms
from experiments.training.train import set_up, train


def run(config, folder, shared=None):
    train(set_up(config), folder, shared=shared)
    return run_folder.read(folder)


@pytest.fixture(scope="module")
def programs():
    return SharedPrograms(set_up(RunConfig()).model)


@pytest.mark.slow  # trains whole runs
@pytest.mark.parametrize(
    "method",
    [
        "cabs",
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("constant", "geometric_growth")),
    ],
)
def test_a_run_with_shared_programs_is_the_run_without(method, programs, tmp_path):
    config = RunConfig(
        method=method, learning_rate=0.8, examples=700, evaluations=2, max_batch_size=64
    )
    alone, shared = run(config, tmp_path / "a"), run(config, tmp_path / "b", programs)
    np.testing.assert_array_equal(shared.metrics["batch_size"], alone.metrics["batch_size"])
    for column in ("loss", "learning_rate"):
        np.testing.assert_allclose(shared.metrics[column], alone.metrics[column], rtol=2e-3)
    measured = np.isfinite(shared.metrics["gradient_variance"])
    assert measured.all() if method == "cabs" else not measured.any()


@pytest.mark.slow
def test_another_learning_rate_or_seed_compiles_nothing(programs, tmp_path):
    def compilations(learning_rate, seed):
        config = RunConfig(
            method="constant",
            batch_size=24,
            learning_rate=learning_rate,
            seed=seed,
            steps=3,
            evaluations=1,
            evaluation_examples=20,
        )
        folder = tmp_path / f"{learning_rate}-{seed}"
        train(set_up(config), folder, shared=programs)
        return json.loads((folder / run_folder.SUMMARY).read_text())["compilations"]

    assert compilations(0.1, 0) == 2  # a gradient and an update
    assert compilations(0.2, 0) == compilations(0.1, 1) == 0
