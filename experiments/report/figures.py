"""The figures of one data set, as PNG."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from experiments.escape import for_figure
from experiments.report import analysis, devices, tables
from experiments.report.analysis import UNITS, WEIGHTS, DataSet, Method
from experiments.training.figure import COLOURS, blank, doubling, finish, logarithmic, percent

# With the colour, each method has a marker and a dash of its own: grey print keeps them apart.
_MARKERS = "osD^vPX*<>hp"
# One more than colours, so that the two together repeat late.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
_UNIT_LABELS = {"examples": "examples seen", "seconds": "seconds of steps", "steps": "steps"}
_Style = dict[str, Any]


def curves(data: DataSet) -> bytes:
    """Loss against examples, seconds and steps; batch sizes, and accuracies at the end."""
    shown = tables.finalists(data)
    figure = blank(15, 7.4)
    rows = figure.subplots(2, len(UNITS) + 1)
    for weights, row in zip(WEIGHTS, rows, strict=True):
        for unit, ax in zip(UNITS, row[:-1], strict=True):
            for index, method in enumerate(shown):
                _curve(ax, data, method, weights, unit, _style(index, method.title))
            _log_losses(ax, data.asked.targets if data.asked else ())
            ax.set(xlabel=_UNIT_LABELS[unit], ylabel=f"training loss at {weights}")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if not ax.lines:
                _say(ax, "not measured:\ngive --clock" if unit == "seconds" else "no averages kept")
    sizes, accuracies = rows[0][-1], rows[1][-1]
    for index, method in enumerate(shown):
        runs = list(method.runs[tables.best_rate(method, "w")].values())
        size = np.median([result.batch_sizes for result in runs], axis=0)
        seen = np.linspace(0, min(r.examples[-1] for r in runs), len(size) + 1)[1:]
        sizes.plot(seen, size, markevery=(2 + index, 10), **_style(index, method.title))
        for offset, weights in zip((-0.12, 0.12), method.weights, strict=False):
            values = method.accuracies(tables.best_rate(method, weights), weights)
            style = _style(index, method.title) | {"linestyle": "none", "label": None}
            face = style["color"] if weights == "w" else "white"
            places = np.full(len(values), index + offset)
            accuracies.plot(places, values, markerfacecolor=face, **style)
    doubling(sizes, "y")
    sizes.set(xlabel="examples seen", ylabel="batch size")
    sizes.xaxis.set_major_formatter(EngFormatter(sep=""))
    percent(accuracies)
    accuracies.set(ylabel="test accuracy at the end, each seed", xlabel="filled: w, open: w̄")
    accuracies.set_xticks([])
    accuracies.margins(0.1)
    _legend(figure, rows[0][0])
    return _png(figure, f"{data.title}: each method at its best learning rate")


def sensitivity(data: DataSet) -> bytes:
    """Final loss and test accuracy against the learning rate, at w and at w̄."""
    figure = blank(13, 8)
    rows = figure.subplots(2, 2, sharex=True, sharey="row")
    methods = [method for method in data.tuning.values() if method.runs]
    for index, method in enumerate(methods):
        for (loss, accuracy), weights in zip(rows.T, method.weights, strict=False):
            style = _style(index, method.title)
            finals = [np.exp(method.at(rate, weights, analysis.log_final)) for rate in method.rates]
            middles = [float(np.exp(np.mean(np.log(values)))) for values in finals]
            _with_bars(loss, method.rates, finals, middles, style)
            shares = [method.accuracies(rate, weights) for rate in method.rates]
            _with_bars(accuracy, method.rates, shares, [np.mean(s) for s in shares], style)
    for (loss, accuracy), weights in zip(rows.T, WEIGHTS, strict=True):
        _log_losses(loss, [data.asked.good] if data.asked else [])
        percent(accuracy)
        loss.set(title=f"at {weights}", ylabel="training loss at the end")
        accuracy.set(xlabel="learning rate α", ylabel="test accuracy at the end")
        for ax in (loss, accuracy):
            logarithmic(ax, "x")
            if not ax.lines:
                _say(ax, "no averages kept")
    _legend(figure, rows[0][0])
    return _png(figure, f"{data.title}: sensitivity to the learning rate")


def by_devices(data: DataSet, goals: Sequence[tables.Goal]) -> bytes:
    """Seconds to each target against the number of devices, the quickest drawn broad."""
    columns = min(3, len(goals))
    rows = -(-len(goals) // columns)
    figure = blank(4.8 * columns, 4.2 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    counts = np.logspace(0, 4, 200)
    one = devices.StepCost(1.0, 1.0)  # works are in seconds
    names = list(dict.fromkeys(name for goal in goals for name in goal.works))
    for ax, goal in zip(axes, goals, strict=False):
        for name, work in goal.works.items():
            style = _style(names.index(name), name) | {"marker": None}
            ax.plot(counts, devices.seconds(work, one, counts), **style)
        for name, (first, last) in devices.quickest(goal.works, one).items():
            within = counts[(counts >= first) & (counts <= last)]
            colour = _style(names.index(name), name)["color"]
            best = devices.seconds(goal.works[name], one, within)
            ax.plot(within, best, color=colour, linewidth=8, alpha=0.3)
        logarithmic(ax, "y")
        ax.set_xscale("log")
        ax.set(title=f"to {goal.target:g} at {goal.weights}", xlabel="devices", ylabel="seconds")
        ax.legend(frameon=False, fontsize=7)
    for ax in axes[len(goals) :]:
        ax.remove()
    return _png(figure, f"{data.title}: who is the quickest on how many devices (broad)")


def floors(data: DataSet) -> bytes:
    """The loss that constant sizes reach, and the floor that their noise predicts."""
    figure = blank(8, 5)
    ax = figure.subplots()
    for index, method in enumerate(analysis.constants(data.tuning)):
        style = _style(index, method.title)
        for weights, width in zip(method.weights, (2.0, 1.0), strict=False):
            logs = [np.mean(method.at(rate, weights, analysis.log_final)) for rate in method.rates]
            label = f"{style['label']}, loss at {weights}"
            line = style | {"linewidth": width, "label": label, "linestyle": "-"}
            ax.plot(method.rates, np.exp(logs), **line)
        floor = [tables.floor(method, rate)[1] for rate in method.rates]
        label = f"{style['label']}, floor"
        ax.plot(method.rates, floor, **style | {"linestyle": ":", "label": label})
    logarithmic(ax, "x")
    logarithmic(ax, "y")
    ax.set(xlabel="learning rate α", ylabel="training loss")
    _legend(figure, ax)
    return _png(figure, f"{data.title}: loss reached, and the noise floor α·ξ/(4m)")


def _curve(ax: Any, data: DataSet, method: Method, weights: str, unit: str, style: _Style) -> None:
    """The median over seeds and a band of all of them, up to where the shortest run ends."""
    if weights not in method.weights:
        return
    runs = list(method.runs[tables.best_rate(method, weights)].values())
    found = (analysis.positions(result, unit, data.clock) for result in runs)
    where = [position for position in found if position is not None]
    if len(where) < len(runs):
        return
    grid = np.linspace(0, min(position[-1] for position in where), 100)

    def of(name: str) -> np.ndarray:
        losses = [analysis.losses(result, name) for result in runs]
        return np.array([np.interp(grid, x, y) for x, y in zip(where, losses, strict=True)])

    values = min(map(of, WEIGHTS[weights]), key=lambda each: np.nan_to_num(each[:, -1]).sum())
    ax.plot(grid, np.median(values, axis=0), markevery=(5, 25), **style)
    if len(runs) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        ax.fill_between(grid, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _with_bars(
    ax: Any, rates: Sequence[float], values: Sequence[np.ndarray], middles: Any, style: _Style
) -> None:
    ax.plot(rates, middles, **style)
    ends = [each.min() for each in values], [each.max() for each in values]
    ax.vlines(rates, *ends, color=style["color"], linewidth=0.8)


def _log_losses(ax: Any, marked: Iterable[float]) -> None:
    """A logarithmic loss axis with lines at losses, where they lie in what is drawn."""
    low, high = ax.get_ylim()
    for loss in marked:
        if ax.lines and low <= loss <= high:
            ax.axhline(loss, color="0.6", linewidth=0.8)
    logarithmic(ax, "y")


def _say(ax: Any, words: str) -> None:
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, color="0.4")


def _legend(figure: Figure, ax: Any) -> None:
    """Below all axes, as wide as the figure and no wider."""
    handles, labels = ax.get_legend_handles_labels()
    letters = 12 * figure.get_figwidth()
    columns = max(1, min(7, int(letters / (8 + max(map(len, labels), default=0)))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _style(index: int, title: str) -> _Style:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.5,
        "label": for_figure(title),
    }


def _png(figure: Figure, title: str) -> bytes:
    finish(figure, title)
    buffer = io.BytesIO()
    # Without the date, the same results give the same file.
    figure.savefig(buffer, dpi=100, format="png", metadata={"Software": None})
    return buffer.getvalue()
