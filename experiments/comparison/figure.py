"""The figure of the main job: a row for each problem, and what one should see first at its left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, NullLocator

from experiments.comparison.outcome import AVERAGED, Outcome
from experiments.comparison.runs import MAIN
from experiments.training.figure import blank, doubling, logarithmic
from experiments.training.run_folder import replacing

COLOURS = dict(zip(MAIN, ("#0072B2", "#E69F00", "#009E73", "#D55E00"), strict=True))
DASHES = dict(zip(MAIN, ("-", "-", "-.", "-"), strict=True))
WIDTHS = dict(zip(MAIN, (4.5, 1.8, 1.8, 2.8), strict=True))  # CABS often lies on constant 16


def plot(outcomes: Sequence[Outcome], rate: float, path: Path) -> None:
    """Draws all problems, and the runs at one learning rate, into a PNG, which is replaced whole.

    Lines are medians over seeds, shades reach from the smallest to the largest.
    """
    figure = blank(13, 1 + 3.3 * len(outcomes))
    rows = figure.subplots(len(outcomes), 3, squeeze=False)
    for (by_rate, by_examples, by_size), outcome in zip(rows, outcomes, strict=True):
        a = outcome.grid.learning_rates.index(rate)
        ends = np.array([0, *outcome.ends])
        for method, averaged in outcome.shown():
            if method not in MAIN:
                continue
            losses = outcome.curve(method, averaged)
            line = _line(method, averaged)
            _banded(by_rate, np.array(outcome.grid.learning_rates), losses[..., -1], line)
            along = np.concatenate([outcome.untrained[:, None], losses[a]], axis=1)
            _banded(by_examples, ends, along.T, line)
            if not averaged:
                sizes = outcome.sizes(method, rate, outcome.grid.seeds[0])
                line = {**line, "linewidth": line["linewidth"] / 1.5}
                by_size.step(np.cumsum(sizes), sizes, where="pre", **line)
        untrained = float(np.median(outcome.untrained))
        by_rate.axhline(untrained, color="gray", linewidth=1, linestyle=":")
        by_rate.text(outcome.grid.learning_rates[0], untrained * 1.1, "untrained", color="gray")
        by_rate.set_title(outcome.title, loc="left", fontweight="bold")
        by_examples.set_title(f"on the way, at learning rate {rate:g}", loc="left")
        by_size.set_title(f"batch size, at learning rate {rate:g}, one seed", loc="left")
        _label(by_rate, by_examples, by_size, outcome.grid.learning_rates, outcome.ends[-1])
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _line(method: str, averaged: bool) -> dict[str, Any]:
    return {
        "color": COLOURS[method],
        "linewidth": 1.8 if averaged else WIDTHS[method],
        "linestyle": (0, (2, 1.2)) if averaged else DASHES[method],
        "alpha": 0.45 if method == "constant 16" and not averaged else 1,
        "label": f"{method}, averaged weights" if averaged else method,
        # Averaged weights above all: they are the rival to beat.
        "zorder": 3 + averaged + (method in AVERAGED),
    }


def _banded(axes: Any, x: np.ndarray, losses: np.ndarray, line: dict[str, Any]) -> None:
    """Draws losses (len(x), seeds) as a line and a shade."""
    finite = np.where(np.isfinite(losses), losses, np.nan)
    axes.plot(x, np.median(finite, axis=1), **line)
    axes.fill_between(
        x, finite.min(axis=1), finite.max(axis=1), color=line["color"], alpha=0.12, linewidth=0
    )


def _label(
    by_rate: Any, by_examples: Any, by_size: Any, rates: Sequence[float], examples: int
) -> None:
    logarithmic(by_rate, "x")
    by_rate.set_xticks(rates)
    by_rate.xaxis.set_minor_locator(NullLocator())
    by_rate.set(
        yscale="log",
        xlabel="learning rate α",
        ylabel=f"loss above the optimum\nafter {examples:,} examples",
    )
    by_examples.set(yscale="log", ylabel="loss above the optimum")
    doubling(by_size, "y")
    by_size.set_ylabel("batch size")
    for axes in (by_examples, by_size):
        axes.set_xlabel("examples seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (by_rate, by_examples, by_size):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
