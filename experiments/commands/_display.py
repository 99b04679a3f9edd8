"""What a run shows on the terminal: progress bars and a table of summaries."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.escape import for_terminal, printable
from experiments.training.config import RunConfig

REFRESH_SECONDS = 0.1
FIGURE_SECONDS = 60.0
FIGURE_SHARE = 0.01  # of the time, at most, goes into figures of a run that goes on


def progress_bars(console: Console) -> Progress:
    """A live display for any number of runs, each drawn by an `observer`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("batch {task.fields[batch_size]:4d}"),
        TextColumn("{task.fields[rate]:7,.0f} examples/s"),
        TimeRemainingColumn(),
        console=console,
    )


def observer(bars: Progress, label: str, config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """Adds a bar to `bars` and returns what moves it: the `observe` of `train`."""
    unit, total = config.limit
    task = bars.add_task(printable(label), total=total, loss=float("nan"), batch_size=0, rate=0.0)
    drawn, examples, seconds = 0.0, 0, 0.0

    def observe(metrics: dict[str, Any]) -> None:
        nonlocal drawn, examples, seconds
        now = time.perf_counter()
        if not drawn and metrics["step"] > 1:  # resumed: what was done before has no speed
            bars.reset(task, completed=metrics[unit])
            examples, seconds = metrics["examples"], metrics["seconds"] - REFRESH_SECONDS
        if now - drawn < REFRESH_SECONDS and metrics[unit] < total:
            return
        bars.update(
            task,
            completed=metrics[unit],
            loss=metrics["loss"],
            batch_size=metrics["batch_size"],
            rate=(metrics["examples"] - examples) / (metrics["seconds"] - seconds),
        )
        drawn, examples, seconds = now, metrics["examples"], metrics["seconds"]

    return observe


@contextmanager
def refreshed(
    draw: Callable[[], None], console: Console, interval: float = FIGURE_SECONDS
) -> Iterator[None]:
    """Calls `draw` in the background now and then: a long run can be watched.

    If it fails, that is said once on the console, and it is not called again; the run goes on.
    """
    ended = threading.Event()

    def repeat() -> None:
        wait = interval
        while not ended.wait(wait):
            started = time.perf_counter()
            try:
                draw()
            except (OSError, ValueError) as error:
                message = f"the figure is not refreshed: {error}"
                console.print(for_terminal(message), soft_wrap=True)
                return
            wait = max(interval, (time.perf_counter() - started) / FIGURE_SHARE)

    thread = threading.Thread(target=repeat, name="figure", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def summary_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each labelled summary."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run")
    for heading in (
        "train loss",
        "test accuracy",
        "steps",
        "mean batch",
        "seconds",
        "compile seconds",
        "shapes compiled",
    ):
        table.add_column(heading, justify="right")
    for label, summary in summaries.items():
        # A run that ended early may have none: not every evaluation is on the test examples.
        accuracy = summary["test_accuracy"]
        table.add_row(
            for_terminal(f"{label} (diverged)" if summary["diverged"] else label),
            f"{summary['train_loss']:.4f}",
            "not measured" if accuracy is None else f"{accuracy:.2%}",
            f"{summary['steps']:,}",
            f"{summary['examples'] / summary['steps']:.1f}",
            f"{summary['seconds']:.1f}",
            f"{summary['compile_seconds']:.1f}",
            str(summary["compilations"]),
        )
    return table
