import io
import threading

import pytest
from rich.console import Console

from experiments.commands._display import observer, progress_bars, refreshed, summary_table
from experiments.escape import printable
from experiments.training.config import RunConfig
from tests.experiments import hostile


def metrics(step, examples, seconds):
    return {
        "step": step,
        "batch_size": 32,
        "loss": 0.5,
        "examples": examples,
        "seconds": seconds,
    }


def test_the_bar_follows_steps_or_examples_and_ends_full():
    for options, unit in (({"steps": 2}, 2), ({"examples": 64}, 64)):
        bars = progress_bars(Console(file=io.StringIO()))
        observe = observer(bars, "CABS", RunConfig(**options))
        observe(metrics(1, 32, 0.1))
        observe(metrics(2, 64, 0.2))
        (task,) = bars.tasks
        assert task.completed == task.total == unit
        assert task.fields["batch_size"] == 32
        assert round(task.fields["rate"]) == 320


SUMMARY = {
    "train_loss": float("nan"),
    "test_accuracy": 0.1,
    "steps": 4,
    "examples": 100,
    "seconds": 1.0,
    "compile_seconds": 0.5,
    "compilations": 1,
    "diverged": True,
}


def test_the_table_marks_a_diverged_run():
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table({"CABS": SUMMARY}))
    printed = console.file.getvalue()
    assert "CABS (diverged)" in printed
    assert "25.0" in printed
    assert "10.00%" in printed


def test_the_table_says_that_an_accuracy_was_not_measured():
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table({"CABS": SUMMARY | {"test_accuracy": None}}))
    assert "not measured" in console.file.getvalue()


def test_the_figure_is_refreshed_until_it_fails_or_the_run_ends():
    drawn, twice = [], threading.Event()

    def draw():
        drawn.append(None)
        if len(drawn) == 2:
            twice.set()
            raise OSError("disk full")

    console = Console(file=io.StringIO(), width=200)
    with refreshed(draw, console, interval=0.001):
        assert twice.wait(timeout=30)
    assert len(drawn) == 2
    assert "the figure is not refreshed: disk full" in console.file.getvalue()
    with refreshed(draw, console):
        pass
    assert len(drawn) == 2


def test_the_bar_of_a_resumed_run_starts_where_it_was():
    bars = progress_bars(Console(file=io.StringIO()))
    observe = observer(bars, "CABS", RunConfig(steps=100))
    observe(metrics(51, 51 * 32, 1000.0))
    (task,) = bars.tasks
    assert task.completed == 51
    assert task.fields["rate"] < 1000


@pytest.mark.parametrize("name", hostile.NAMES)
def test_names_are_printed_letter_by_letter(name):
    called = threading.Event()

    def draw():
        called.set()
        raise OSError(2, "no such file", name)

    console = Console(file=io.StringIO(), width=1000, force_terminal=True, color_system=None)
    with progress_bars(console) as bars:
        observer(bars, name, RunConfig(steps=100))(metrics(1, 32, 0.1))
        bars.refresh()
    console.print(summary_table({name: SUMMARY}))
    with refreshed(draw, console, interval=0.001):
        assert called.wait(timeout=30)
    printed = console.file.getvalue()
    assert printed.count(printable(name)) >= 3
    assert "\x1b[31m" not in printed
    assert "\x00" not in printed
    assert "the figure is not refreshed: [Errno 2] no such file" in printed
