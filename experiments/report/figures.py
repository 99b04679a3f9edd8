"""The figures of one data set, as PNG."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from experiments.escape import for_figure
from experiments.report import analysis
from experiments.report.analysis import DataSet, Method
from experiments.report.statistics import Spread
from experiments.training.figure import COLOURS, blank, doubling, finish, logarithmic, percent

# With the colour, each method has a marker and a dash of its own: grey print keeps them apart.
_MARKERS = "osD^vPX*<>hp"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_PREFERRED = {16: 0, 128: 1, 512: 2}  # of the constant sizes, where there is no room for all
_Style = dict[str, Any]


def curves(data: DataSet) -> bytes:
    """Loss and accuracy against examples and seconds, and batch sizes, each method at its best."""
    shown = _compared(data)
    figure = blank(13, 7.2)
    loss, loss_time, sizes, accuracy, accuracy_time, final = figure.subplots(2, 3).flat
    for index, method in enumerate(shown):
        style, runs = _style(index, method), method.by_rate[method.best_rate]
        for ax, position, value in (
            (loss, _examples, "train_loss"),
            (loss_time, method.seconds, "train_loss"),
            (accuracy, _examples, "test_accuracy"),
            (accuracy_time, method.seconds, "test_accuracy"),
        ):
            grid, median, low, high = analysis.median_curve(runs, position, value)
            ax.plot(grid, median, markevery=(5 + 2 * index, 25), **style)
            if len(runs) > 1:
                ax.fill_between(grid, low, high, color=style["color"], alpha=0.12, linewidth=0)
        size = np.median([result.batch_sizes for result in runs], axis=0)
        seen = np.linspace(0, min(r.examples[-1] for r in runs), len(size) + 1)[1:]
        sizes.plot(seen, size, markevery=(2 + index, 10), **style)
        _point(final, method, index)
    for ax in (loss, loss_time):
        logarithmic(ax, "y")
        ax.axhline(data.target, color="0.6", linewidth=0.8)
        ax.set_ylabel("training loss")
    for ax in (accuracy, accuracy_time):
        percent(ax)
        ax.set_ylabel("test accuracy")
    doubling(sizes, "y")
    sizes.set_ylabel("batch size")
    for ax in (loss, accuracy, sizes):
        ax.set_xlabel("examples seen")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax in (loss_time, accuracy_time):
        ax.set_xlabel("seconds of training steps")
    doubling(final, "x")
    logarithmic(final, "y")
    final.set(xlabel="mean batch size", ylabel="training loss at the end")
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=_columns(labels), frameon=False
    )
    rates = {rate for method in data.methods.values() for rate in method.rates}
    where = "its best learning rate" if len(rates) > 1 else f"learning rate {rates.pop():g}"
    return _png(figure, f"{data.title}: every method at {where}")


def _columns(labels: list[str]) -> int:
    """Columns of a legend that is as wide as the figure and no wider."""
    letters = 170
    return max(1, min(7, letters // (8 + max(map(len, labels)))))


def sensitivity(data: DataSet) -> bytes:
    """Final loss and accuracy against the learning rate, CABS beside three groups of methods."""
    groups = {
        "constant batch sizes": analysis.is_constant,
        "other adaptive batch sizes": analysis.is_rival,
        "decreasing rates, momentum, Adam": analysis.is_variant,
    }
    cabs = [method for method in data.methods.values() if analysis.is_cabs(method)]
    columns = {
        title: [*cabs, *members]
        for title, belongs in groups.items()
        if (members := [m for m in data.methods.values() if belongs(m)])
    } or {"CABS": cabs}
    figure = blank(max(7.0, 4.4 * len(columns)), 7.2)
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for (title, members), (loss, accuracy) in zip(columns.items(), axes.T, strict=True):
        for index, method in enumerate(members):
            style = _style(index, method)
            _with_bars(loss, method, method.final_loss, style)
            _with_bars(accuracy, method, method.final_accuracy, style)
        loss.set_title(title, fontsize=11)
        loss.legend(frameon=False, fontsize=8)
        logarithmic(loss, "y")
        percent(accuracy)
        accuracy.set_xlabel("learning rate")
    axes[0, 0].set_ylabel("training loss at the end")
    axes[1, 0].set_ylabel("test accuracy at the end")
    for ax in axes.flat:
        logarithmic(ax, "x")
    return _png(figure, f"{data.title}: sensitivity to the learning rate")


def _compared(data: DataSet) -> list[Method]:
    """At most seven methods of plain SGD at a constant rate: CABS, its rivals, constant sizes."""
    methods = list(data.methods.values())
    cabs = [m for m in methods if analysis.is_cabs(m)]
    constants = [m for m in methods if analysis.is_constant(m)]
    rivals = {m.config.method: m for m in reversed(methods) if analysis.is_rival(m)}
    constants.sort(key=lambda m: _PREFERRED.get(m.config.batch_size, len(_PREFERRED)))
    room = max(1, 7 - len(cabs) - len(rivals))
    return [*cabs, *constants[:room], *reversed(rivals.values())][:7] or methods[:7]


def _examples(result: Any) -> np.ndarray:
    examples: np.ndarray = result.examples
    return examples


def _with_bars(ax: Any, method: Method, value: Callable[[float], Spread], style: _Style) -> None:
    spreads = [value(rate) for rate in method.rates]
    median = np.array([s.median for s in spreads])
    extremes = np.array([[s.low for s in spreads], [s.high for s in spreads]])
    shown = np.isfinite(median)
    ax.plot(np.array(method.rates)[shown], median[shown], **style)
    both = shown & np.isfinite(extremes).all(axis=0)
    ax.vlines(np.array(method.rates)[both], *extremes[:, both], color=style["color"], linewidth=0.8)


def _point(ax: Any, method: Method, index: int) -> None:
    style = _style(index, method)
    best = method.best_rate
    size, loss = method.mean_batch_size(best), method.final_loss(best)
    if np.isfinite(loss.median):
        ax.plot(size.median, loss.median, **(style | {"linestyle": "none", "markersize": 8}))


def _style(index: int, method: Method) -> _Style:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 2.0 if analysis.is_cabs(method) else 1.3,
        "label": for_figure(method.title),
    }


def _png(figure: Figure, title: str) -> bytes:
    finish(figure, title)
    buffer = io.BytesIO()
    # Without the date, the same results give the same file.
    figure.savefig(buffer, dpi=100, format="png", metadata={"Software": None})
    return buffer.getvalue()
