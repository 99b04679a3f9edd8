"""The tables of one data set, and the numbers that its figures share with them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report import analysis, devices, statistics
from experiments.report.analysis import UNITS, WEIGHTS, DataSet, Method, Sensitivity
from experiments.report.devices import Work
from experiments.report.render import Table
from experiments.report.results import Result
from experiments.report.statistics import Reached
from experiments.report.verdicts import settled

_NOTHING = "–"


class Goal(NamedTuple):
    """A target at one kind of weights, and what methods take to it, in seconds of one device.

    Attributes:
      target: The training loss.
      weights: "w" or "w̄".
      works: {method and learning rate: seconds of all its steps and of all its examples}.
    """

    target: float
    weights: str
    works: dict[str, Work]


def finalists(data: DataSet) -> list[Method]:
    """The methods of the finals that have runs; before there are any, those of the grid."""
    finals = [settled(method) for method in data.finals.values() if method.runs]
    return finals or [at_choice(method) for method in data.tuning.values() if method.runs]


def at_choice(method: Method) -> Method:
    """With its runs at its best learning rate only."""
    rate = method.choice().rate
    return method._replace(runs={rate: method.runs[rate]})


def best_rate(method: Method, weights: str) -> float:
    """Of the learning rates that it has, that of the lowest mean of ln final loss."""

    def mean_log(rate: float) -> float:
        return float(np.mean(method.at(rate, weights, analysis.log_final)))

    return min(method.rates, key=mean_log)


def floor(method: Method, rate: float) -> tuple[float, float]:
    """ξ over the last quarter of the runs of a constant size, and the floor α·ξ/(4m)."""
    runs = list(method.runs[rate].values())
    late = np.array([result.variance[-len(result.variance) // 4 :] for result in runs])
    if np.isnan(late).all():
        return float("nan"), float("nan")
    variance = np.nanmean(late)
    rate, size = runs[0].run.config.learning_rate, np.array(method.config.batch_size)
    return float(variance), float(statistics.noise_floor(rate, variance, size))


def to_target(data: DataSet, result: Result, weights: str, target: float, unit: str) -> Reached:
    """What a run took to a target in a unit; NaN where no clock tells."""
    where = analysis.positions(result, unit, data.clock)
    if where is None:
        return Reached(float("nan"), False)
    return statistics.time_to_target(where, analysis.losses(result, weights), target)


def goals(data: DataSet) -> list[Goal]:
    """The targets that two methods or more reach with every seed, where the clock was measured."""
    found = []
    for weights in WEIGHTS:
        for target in data.asked.targets if data.asked else ():
            works = {}
            for method in finalists(data):
                for rate in method.rates if weights in method.weights else ():
                    if work := _work(data, method, rate, weights, target):
                        works[f"{method.title}, α = {rate:g}"] = work
            if len(works) > 1:
                found.append(Goal(target, weights, works))
    return found


def _work(data: DataSet, method: Method, rate: float, weights: str, target: float) -> Work | None:
    runs = list(method.runs[rate].values())
    cost = data.clock.step_cost(runs[0].run)
    found = []
    for name in WEIGHTS[weights]:
        examples, steps = (
            [to_target(data, run, name, target, unit) for run in runs]
            for unit in ("examples", "steps")
        )
        if all(time.is_reached for time in examples):
            means = (float(np.mean([time.cost for time in times])) for times in (steps, examples))
            found.append(Work(*means))
    if cost is None or not found:
        return None
    best = min(found, key=lambda work: work.examples)
    return Work(cost.step * best.steps, cost.example * best.examples)


def grid(data: DataSet) -> Table:
    """What the grid chose, and how much each method depends on it."""
    methods = [method for method in data.tuning.values() if method.runs]
    kept = [w for w in WEIGHTS if all(w in method.weights for method in methods)]
    over_all = {w: analysis.sensitivity(data, w)[1] for w in kept}
    unknown = Sensitivity(np.array([np.nan]), np.nan)

    def numbers_at(method: Method, weights: str) -> list[float]:
        if weights not in method.weights:
            return [float("nan")] * len(forms)
        rate = method.choice().rate
        found = over_all.get(weights, {}).get(method.label, unknown)
        losses = method.at(rate, weights, analysis.log_final)
        means = (losses, method.accuracies(rate, weights), found.excess)
        return [*(float(np.mean(values)) for values in means), found.decades]

    def numbers(method: Method) -> np.ndarray:
        return np.array([numbers_at(method, w) for w in WEIGHTS]).T.ravel()

    names = ("loss", "test accuracy", "over all α", "decades")
    forms = [_exponential, _percent, _times, "{:.2f}".format]
    header = ("method", "best α", "mean size", *(f"{n}, {w}" for n in names for w in WEIGHTS))
    forms_of_all = [form for form in forms for _ in WEIGHTS]
    rows = [
        (m.title, _chosen(m), f"{m.size(m.choice().rate):.0f}", *_shown(numbers(m), forms_of_all))
        for m in methods
    ]
    constants = analysis.constants(data.tuning)
    sizes = {m.title: m.size(m.choice().rate) for m in methods if analysis.is_cabs(m.config)}
    rows += _at_mean_sizes(sizes, constants, numbers, forms_of_all)
    return Table(header, rows)


def finals(data: DataSet) -> Table:
    """The finalists at w and at w̄: losses, accuracies, and three costs to each target."""
    targets = data.asked.targets if data.asked else ()
    goals = [(target, unit) for target in targets for unit in UNITS]
    forms = [_exponential, _percent, *[_count] * len(goals)]
    header = (
        *("method", "α", "mean size", "loss", "test accuracy"),
        *(f"{unit} to {target:g}" for target, unit in goals),
    )
    rows = []
    shown = finalists(data)
    for weights in WEIGHTS:
        methods = [method for method in shown if weights in method.weights]

        def numbers(method: Method, weights: str = weights) -> np.ndarray:
            rate = best_rate(method, weights)
            return np.array(
                [
                    np.mean(method.at(rate, weights, analysis.log_final)),
                    np.mean(method.accuracies(rate, weights)),
                    *(_cost(data, method, rate, weights, *goal)[0] for goal in goals),
                ]
            )

        for method in methods:
            rate = best_rate(method, weights)
            cells = _shown(numbers(method), forms)
            bounds = [_cost(data, method, rate, weights, *goal)[1] for goal in goals]
            accuracies = method.accuracies(rate, weights)
            if len(accuracies) > 1 and not np.isnan(accuracies).any():
                error = float(np.std(accuracies, ddof=1)) / len(accuracies) ** 0.5
                cells[1] += f" ± {100 * error:.1f}"
            marked = [
                f"≥ {cell}" if is_bound and cell != _NOTHING else cell
                for cell, is_bound in zip(cells[2:], bounds, strict=True)
            ]
            title = f"{method.title}, {weights}"
            rows.append((title, f"{rate:g}", f"{method.size(rate):.0f}", *cells[:2], *marked))
        sizes = {
            f"{m.title}, {weights}": m.size(best_rate(m, weights))
            for m in methods
            if analysis.is_cabs(m.config)
        }
        constants = [m for m in methods if analysis.is_constant(m.config)]
        constants.sort(key=lambda method: method.config.batch_size)
        rows += _at_mean_sizes(sizes, constants, numbers, forms)
    return Table(header, rows)


def floors(data: DataSet) -> Table:
    """What constant sizes end at, beside the floor that their gradient noise predicts."""
    header = ("constant size", "α", "ξ, last quarter", "floor α·ξ/(4m)", "loss, w", "loss, w̄")
    rows = []
    for method in analysis.constants(data.tuning):
        for rate in method.rates:
            losses = [
                _exponential(float(np.mean(method.at(rate, weights, analysis.log_final))))
                for weights in method.weights
            ]
            losses += [_NOTHING] * (len(WEIGHTS) - len(losses))
            numbers = (_decimal(x, "{:.3g}") for x in floor(method, rate))
            rows.append((method.title, f"{rate:g}", *numbers, *losses))
    return Table(header, rows)


def by_devices(goals: Sequence[Goal]) -> Table:
    """From how many devices to how many each method is the quickest."""
    one = devices.StepCost(1.0, 1.0)  # works are in seconds
    rows = [
        (
            f"{goal.target:g} at {goal.weights}",
            "; ".join(
                f"{name}: {first:.3g} to {'∞' if np.isinf(last) else f'{last:.3g}'}"
                for name, (first, last) in devices.quickest(goal.works, one).items()
            ),
        )
        for goal in goals
    ]
    return Table(("target", "the quickest, by number of devices"), rows)


def _cost(
    data: DataSet, method: Method, rate: float, weights: str, target: float, unit: str
) -> tuple[float, bool]:
    """The mean over seeds of the logarithm, at the better average, and whether it is a bound."""
    options = []
    for name in WEIGHTS[weights]:
        runs = method.runs[rate].values()
        times = [to_target(data, run, name, target, unit) for run in runs]
        mean = float(np.mean([np.log(max(time.cost, 1e-9)) for time in times]))
        options.append((mean, not all(time.is_reached for time in times)))
    return min(options)


def _at_mean_sizes(
    sizes: dict[str, float],
    constants: Sequence[Method],
    numbers: Callable[[Method], np.ndarray],
    forms: Sequence[Callable[[float], str]],
) -> list[tuple[str, ...]]:
    """A row for each CABS: the constant size equal to its own mean, interpolated in ln m."""
    if not constants:
        return []
    known = [method.config.batch_size for method in constants]
    values = np.array([numbers(method) for method in constants])
    return [
        (
            f"the constant size of {title}, interpolated",
            "",
            f"{size:.0f}",
            *_shown(statistics.at_batch_size(size, known, values), forms),
        )
        for title, size in sizes.items()
    ]


def _chosen(method: Method) -> str:
    choice = method.choice()
    extend = f", at the edge: extend to {choice.extend:g}" if choice.extend is not None else ""
    return f"{choice.rate:g}{extend}"


def _shown(values: np.ndarray, forms: Sequence[Callable[[float], str]]) -> list[str]:
    pairs = zip(values.tolist(), forms, strict=True)
    return [_NOTHING if np.isnan(value) else form(value) for value, form in pairs]


def _exponential(log: float) -> str:
    return f"{np.exp(log):.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _times(log: float) -> str:
    return f"{np.exp(log):.2f}×"


def _decimal(value: float, form: str = "{:.2f}") -> str:
    return _NOTHING if np.isnan(value) else form.format(value)


def _count(log: float) -> str:
    number = np.exp(log)
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
