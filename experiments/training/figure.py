"""The figure of one or more runs: loss, batch size and accuracy against examples seen."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from experiments.training.run_folder import Record, replacing

# Okabe and Ito's colours, told apart by every kind of colour vision; the dashes by printers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
POINTS = 200


def plot(runs: Mapping[str, Record], path: Path, title: str = "") -> None:
    """Draws the labelled runs into a PNG at `path`, which is replaced whole."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, batch_size, accuracy = figure.subplots(1, 3, sharex=True)
    for index, (label, run) in enumerate(runs.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "label": label,
        }
        seen = run.metrics["examples"]
        step_loss = binned_mean(seen, run.metrics["loss"], run.metrics["batch_size"])
        loss.plot(*step_loss, color=style["color"], alpha=0.3, linewidth=0.8)
        loss.plot(run.evaluations["examples"], run.evaluations["train_loss"], **style)
        batch_size.step(seen, run.metrics["batch_size"], where="pre", linewidth=1, **style)
        accuracy.plot(run.evaluations["examples"], run.evaluations["test_accuracy"], **style)

    loss.set(ylabel="training loss", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    loss.yaxis.set_minor_formatter(NullFormatter())
    batch_size.set_ylabel("batch size")
    batch_size.set_yscale("log", base=2)
    batch_size.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    accuracy.set(ylabel="test accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    shown = np.concatenate([late_accuracies(run.evaluations) for run in runs.values()])
    accuracy.set_ylim(min(shown.min(), shown.max() - 0.05), shown.max() + 0.005)
    for axes in (loss, batch_size, accuracy):
        axes.set_xlabel("examples seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        loss.legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def late_accuracies(evaluations: Mapping[str, np.ndarray]) -> np.ndarray:
    """The test accuracies of the run's second half, whose differences are worth seeing."""
    examples = evaluations["examples"]
    late: np.ndarray = evaluations["test_accuracy"][examples >= examples[-1] / 2]
    return late


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
