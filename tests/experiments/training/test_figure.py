import io

import numpy as np
import pytest
from PIL import Image

from experiments.training import figure
from experiments.training.figure import binned_mean, plot
from experiments.training.run_folder import Record
from tests.experiments import hostile


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


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 500])
def test_plot_draws_runs_of_any_length(tmp_path, steps):
    plot({"CABS": record(steps, 32), "constant": record(steps, 16)}, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1800, 570)
        assert len(image.getcolors(maxcolors=1 << 20)) > 50


def test_a_run_that_lacks_what_is_drawn_is_named(tmp_path):
    run = record(8, 16)
    del run.metrics["loss"], run.evaluations["test_accuracy"]
    with pytest.raises(ValueError, match="the run 'CABS' lack loss, test_accuracy"):
        plot({"CABS": run}, tmp_path / "figure.png")


def test_a_bin_weighs_steps_by_their_examples():
    position, mean = binned_mean(
        position=np.array([10.0, 40.0, 40_000.0]),
        value=np.array([4.0, 1.0, 5.0]),
        weight=np.array([10.0, 30.0, 39_960.0]),
    )
    np.testing.assert_array_equal(position, [40.0, 40_000.0])
    np.testing.assert_allclose(mean, [1.75, 5.0])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(hostile.NAMES), 6))
def test_names_of_runs_are_drawn_whatever_they_are(tmp_path, first):
    names = hostile.NAMES[first : first + 6]
    plot(dict.fromkeys(names, record(8, 16)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.NAMES)
def test_titles_are_drawn_whatever_they_are(name):
    drawing, png = figure.blank(2, 1), io.BytesIO()
    drawing.subplots()
    figure.finish(drawing, name)
    drawing.savefig(png, dpi=50)
    assert png.getbuffer().nbytes > 500


@pytest.mark.slow
def test_every_run_is_in_the_legend_and_all_accuracies_are_in_sight(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure, "finish", lambda drawing, title: drawn.append(drawing))
    runs = {"": record(8, 16), "_hidden": record(8, 32), "$x^$": record(8, 64)}
    plot(runs, tmp_path / "figure.png")
    loss, _, accuracy = drawn[0].axes
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert [label.strip().replace("\\", "") for label in labels] == list(runs)
    low, high = accuracy.get_ylim()
    assert low <= 0
    assert high >= 1


@pytest.mark.slow
def test_the_title_is_centred_over_the_axes():
    drawing = figure.blank(8, 3)
    left, right = drawing.subplots(1, 2)
    left.set_ylabel("three\nlines of\nlabel")
    figure.finish(drawing, "title")
    drawing.savefig(io.BytesIO())
    middle = (left.get_position().x0 + right.get_position().x1) / 2
    assert drawing.get_suptitle() == "title"
    assert drawing._suptitle.get_position()[0] == pytest.approx(middle, abs=1e-3)
    assert middle != pytest.approx(0.5, abs=1e-2)
