"""The figure of one or more runs: loss, batch size and accuracy against examples seen."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from experiments.escape import for_figure
from experiments.training.run_folder import Record, replacing

# Okabe and Ito's colours, told apart by every kind of colour vision; the dashes by printers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
POINTS = 200
SHOWN = ("examples", "batch_size", "loss"), ("examples", "train_loss", "test_accuracy")


def plot(runs: Mapping[str, Record], path: Path, title: str = "") -> None:
    """Draws the labelled runs into a PNG at `path`, which is replaced whole.

    Raises:
      ValueError: A run lacks what is drawn.
    """
    for label, run in runs.items():
        parts = zip(SHOWN, (run.metrics, run.evaluations), strict=True)
        if missing := [key for keys, columns in parts for key in keys if key not in columns]:
            raise ValueError(f"the lines of the run {label!r} lack {', '.join(missing)}.")
    figure = blank(12, 3.8)
    loss, batch_size, accuracy = figure.subplots(1, 3, sharex=True)
    for index, (label, run) in enumerate(runs.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "label": for_figure(label),
        }
        seen = run.metrics["examples"]
        step_loss = binned_mean(seen, run.metrics["loss"], run.metrics["batch_size"])
        loss.plot(*step_loss, color=style["color"], alpha=0.3, linewidth=0.8)
        loss.plot(run.evaluations["examples"], run.evaluations["train_loss"], **style)
        batch_size.step(seen, run.metrics["batch_size"], where="pre", linewidth=1, **style)
        accuracy.plot(run.evaluations["examples"], run.evaluations["test_accuracy"], **style)
    logarithmic(loss, "y")
    doubling(batch_size, "y")
    percent(accuracy)
    loss.set_ylabel("training loss")
    batch_size.set_ylabel("batch size")
    accuracy.set_ylabel("test accuracy")
    for axes in (loss, batch_size, accuracy):
        axes.set_xlabel("examples seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(runs) > 1:
        loss.legend(frameon=False)
    finish(figure, title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def blank(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def logarithmic(axes: Any, which: str) -> None:
    """Makes the axis `which`, "x" or "y", logarithmic, with plain numbers at its ticks."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def doubling(axes: Any, which: str) -> None:
    """Makes the axis `which` logarithmic, for batch sizes, with ticks at powers of two."""
    logarithmic(axes, which)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base=2))
    axis.set_minor_locator(NullLocator())


def percent(axes: Any) -> None:
    """Shows the accuracies on the y axis as percentages, with as many digits as its ticks need."""
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")


def finish(figure: Figure, title: str) -> None:
    """Draws grids and, centred over the axes, the title, on as many lines as it needs."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    letters_per_inch = 11
    width = int(figure.get_figwidth() * letters_per_inch)
    heading = figure.suptitle(textwrap.fill(for_figure(title, 2 * width), width))
    figure.draw_without_rendering()  # places the axes
    edges = [edge for axes in figure.axes for edge in axes.get_position().intervalx]
    heading.set_x((min(edges) + max(edges)) / 2)


def binned_mean(
    position: np.ndarray, value: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean of `value` in each of `POINTS` equal stretches of `position`.

    Returns:
      The last position and the mean of every stretch that holds anything.
    """
    stretch = np.minimum((position / position[-1] * POINTS).astype(int), POINTS - 1)
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    ends = np.append(starts[1:], len(position)) - 1
    mean = np.add.reduceat(value * weight, starts) / np.add.reduceat(weight, starts)
    return position[ends], mean
