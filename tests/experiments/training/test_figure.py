import numpy as np
import pytest
from PIL import Image

from experiments.training.figure import binned_mean, plot
from experiments.training.run_folder import Record


def record(steps, size):
    seen = np.arange(1, steps + 1) * float(size)
    return Record(
        config={},
        metrics={"examples": seen, "loss": 1 / seen, "batch_size": np.full(steps, float(size))},
        evaluations={
            "examples": seen[::2],
            "train_loss": 1 / seen[::2],
            "test_accuracy": np.linspace(0, 1, len(seen[::2])),
        },
        summary={},
    )


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_plot_draws_runs_of_any_length(tmp_path, steps):
    plot({"CABS": record(steps, 32), "constant": record(steps, 16)}, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1800, 570)
        assert len(image.getcolors(maxcolors=1 << 20)) > 50


def test_a_bin_weighs_steps_by_their_examples():
    position, mean = binned_mean(
        position=np.array([10.0, 40.0, 40_000.0]),
        value=np.array([4.0, 1.0, 5.0]),
        weight=np.array([10.0, 30.0, 39_960.0]),
    )
    np.testing.assert_array_equal(position, [40.0, 40_000.0])
    np.testing.assert_allclose(mean, [1.75, 5.0])
