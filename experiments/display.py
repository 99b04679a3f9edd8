"""What a run shows on the terminal: progress bars and a table of summaries."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.config import RunConfig

REFRESH_SECONDS = 0.1


def progress_bars(console: Console) -> Progress:
    """A live display for any number of runs, each drawn by an `observer`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("batch {task.fields[batch_size]:4d}"),
        TextColumn("{task.fields[rate]:7,.0f} examples/s"),
        TimeRemainingColumn(),
        console=console,
    )


def observer(bars: Progress, label: str, config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """Adds a bar to `bars` and returns what moves it: `observe` of `experiments.train.train`."""
    unit, total = config.limit
    task = bars.add_task(label, total=total, loss=float("nan"), batch_size=0, rate=0.0)
    drawn, examples, seconds = 0.0, 0, 0.0

    def observe(metrics: dict[str, Any]) -> None:
        nonlocal drawn, examples, seconds
        now = time.perf_counter()
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
        table.add_row(
            f"{label} (diverged)" if summary["diverged"] else label,
            f"{summary['train_loss']:.4f}",
            f"{summary['test_accuracy']:.2%}",
            f"{summary['steps']:,}",
            f"{summary['examples'] / summary['steps']:.1f}",
            f"{summary['seconds']:.1f}",
            f"{summary['compile_seconds']:.1f}",
            str(summary["compilations"]),
        )
    return table
