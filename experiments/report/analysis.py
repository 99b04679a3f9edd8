"""The runs of each method on each data set, and their numbers over seeds."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report.results import Result, Results
from experiments.report.statistics import INFINITY, Spread, crossing, decades_within, spread
from experiments.training.shared_programs import measured_variance

FEWEST_RATES = 3


class Method:
    """All runs of one method on one data set.

    Args:
      label: Its label in the plan.
      title: Its name in reports.
      runs: Its finished runs.
      costs: Seconds of a step by the batch size, for steps of this kind on this data set.
    """

    def __init__(self, label: str, title: str, runs: Sequence[Result], costs: "Costs"):
        self.label, self.title, self.costs = label, title, costs
        self.config = runs[0].run.config
        self.by_rate: dict[float, list[Result]] = {}
        for result in sorted(runs, key=lambda result: result.run.learning_rate):
            self.by_rate.setdefault(result.run.learning_rate, []).append(result)

    @property
    def rates(self) -> list[float]:
        """The learning rates of the data set's grid that have finished runs, increasing."""
        return list(self.by_rate)

    def final_loss(self, rate: float) -> Spread:
        """Training loss at the end; infinite where runs diverged."""
        return spread(result.final_loss for result in self.by_rate[rate])

    def final_accuracy(self, rate: float) -> Spread:
        """Test accuracy at the end; that of a diverged run is what it was when it stopped."""
        return spread(float(result.test_accuracy[-1]) for result in self.by_rate[rate])

    @functools.cached_property
    def best_rate(self) -> float:
        """The learning rate of the smallest median of the final loss."""
        return min(self.rates, key=lambda rate: self.final_loss(rate).median)

    def to_target(self, rate: float, target: float) -> Spread:
        """Examples until the training loss is at the target; infinite where it never is."""
        return spread(crossing(r.examples, r.train_loss, target) for r in self.by_rate[rate])

    def fastest_rate(self, target: float) -> float:
        """The learning rate of the fewest examples to the target; the best if none gets there."""
        fastest = min(self.rates, key=lambda rate: self.to_target(rate, target).median)
        reached = np.isfinite(self.to_target(fastest, target).median)
        return fastest if reached else self.best_rate

    def seconds_to_target(self, rate: float, target: float) -> Spread:
        """Seconds of steps until then, by what a step of each size costs."""
        return spread(
            crossing(self.seconds(result), result.train_loss, target)
            for result in self.by_rate[rate]
        )

    def seconds(self, result: Result) -> np.ndarray:
        """Seconds of steps before each evaluation, (e,)."""
        return np.cumsum([self.costs.of(interval) for interval in result.sizes])

    def mean_batch_size(self, rate: float) -> Spread:
        """Examples over steps."""
        return spread(r.summary["examples"] / r.summary["steps"] for r in self.by_rate[rate])

    def sizes(self, rate: float) -> set[int]:
        """All batch sizes that the runs used."""
        return {size for result in self.by_rate[rate] for steps in result.sizes for size in steps}


class Costs:
    """Seconds of a step by its batch size, from the steps of many runs under varying load.

    Args:
      runs: All runs whose steps compute the same.
    """

    def __init__(self, runs: Iterable[Result]):
        samples: dict[int, list[float]] = {}
        for result in runs:
            for size, seconds in result.step_seconds.items():
                samples.setdefault(size, []).append(seconds)
        self.sizes = np.array(sorted(samples), float)
        self.seconds = np.array([float(np.median(samples[size])) for size in sorted(samples)])

    def of(self, steps: dict[int, int]) -> float:
        """Seconds of so many steps of each size; linear between sizes that were measured."""
        return sum(count * self.step(size) for size, count in steps.items())

    def step(self, size: int) -> float:
        """Seconds of one step; beyond the largest size measured, in proportion to it."""
        if not len(self.sizes):
            return float("nan")
        cost = float(np.interp(size, self.sizes, self.seconds))
        return cost * max(1.0, size / float(self.sizes[-1]))


class DataSet(NamedTuple):
    """All that was measured on one data set, with the same seeds for every method.

    Attributes:
      label: Its label in the plan.
      title: Its name in reports.
      methods: By label, in the order of the plan; those with finished runs.
      target: The training loss that the methods race to: the (higher) median, over CABS and the
        constant sizes, of the final loss at the best learning rate. Half of them get there.
      shared_rate: The learning rate that suits the methods of plain SGD best together.
      seeds: How many seeds the runs have.
    """

    label: str
    title: str
    methods: dict[str, Method]
    target: float
    shared_rate: float
    seeds: int

    @property
    def is_grid(self) -> bool:
        """Whether there are learning rates enough to speak of sensitivity to them."""
        return max(len(method.rates) for method in self.methods.values()) >= FEWEST_RATES


def data_sets(results: Results) -> list[DataSet]:
    """The data sets that have finished runs, in the order of the plan."""
    return [
        _data_set(results, label, title, runs)
        for label, title in results.plan.datasets.items()
        if (runs := _comparable(results, label))
    ]


def _comparable(results: Results, label: str) -> list[Result]:
    """The finished runs of a data set, of whole seeds only as soon as one is whole.

    Medians over other seeds for one method than for another would compare the seeds.
    """
    finished = [result for result in results.runs.values() if result.run.dataset == label]
    unfinished = {run.config.seed for run in results.missing if run.dataset == label}
    whole = [result for result in finished if result.run.config.seed not in unfinished]
    return whole or finished


def _data_set(results: Results, label: str, title: str, runs: list[Result]) -> DataSet:
    by_kind: dict[str, list[Result]] = {}
    for result in runs:
        by_kind.setdefault(measured_variance(result.run.config), []).append(result)
    costs = {kind: Costs(alike) for kind, alike in by_kind.items()}
    methods = {}
    for name, method_title in results.plan.methods.items():
        if own := [result for result in runs if result.run.method == name]:
            kind = measured_variance(own[0].run.config)
            methods[name] = Method(name, method_title, own, costs[kind])
    racing = [m for m in methods.values() if is_cabs(m) or is_constant(m)] or methods.values()
    finals = sorted(m.final_loss(m.best_rate).median for m in racing)
    return DataSet(
        label,
        title,
        methods,
        target=finals[len(finals) // 2],
        shared_rate=_shared_rate(plain(methods.values())),
        seeds=len({result.run.config.seed for result in runs}),
    )


def _shared_rate(methods: Sequence[Method]) -> float:
    """The rate of the smallest geometric mean, over methods, of the loss over the method's best."""
    rates = sorted({rate for method in methods for rate in method.rates})

    def excess(rate: float) -> float:
        ratios = []
        for method in methods:
            best = method.final_loss(method.best_rate).median
            loss = method.final_loss(rate).median if rate in method.by_rate else INFINITY
            # Ten times the best stands for a run that diverged, or was not made.
            ratios.append(min(loss / best, 10.0) if np.isfinite(best) else 1.0)
        return float(np.mean(np.log(ratios)))

    return min(rates, key=excess)


def is_constant(method: Method) -> bool:
    """Whether it is plain SGD with a constant batch size and learning rate."""
    return method.config.method == "constant" and method.config.schedule == "constant"


def is_scheduled(method: Method) -> bool:
    """Whether it is plain SGD with a constant batch size and a decreasing learning rate."""
    return method.config.method == "constant" and method.config.schedule != "constant"


def is_variant(method: Method) -> bool:
    """Whether its learning rate decreases by plan, or it is not plain SGD."""
    name = method.config.method
    return is_scheduled(method) or name.endswith(("_momentum", "_adam"))


def plain(methods: Iterable[Method]) -> list[Method]:
    """Those of plain SGD at a constant learning rate, or all where there is none."""
    everyone = list(methods)
    return [method for method in everyone if not is_variant(method)] or everyone


def is_cabs(method: Method) -> bool:
    """Whether it is plain CABS."""
    return method.config.method == "cabs"


def is_rival(method: Method) -> bool:
    """Whether it adapts the batch size of plain SGD in another way."""
    return not (is_constant(method) or is_variant(method) or is_cabs(method))


def decades(method: Method, factor: float = 2.0) -> float:
    """Decades of the learning rate within `factor` of the method's own best final loss."""
    return _decades(method, factor * method.final_loss(method.best_rate).median)


def decades_of_best(method: Method, methods: Iterable[Method], factor: float = 2.0) -> float:
    """Decades of the learning rate within `factor` of the best final loss of all `methods`."""
    return _decades(method, factor * min(m.final_loss(m.best_rate).median for m in methods))


def _decades(method: Method, limit: float) -> float:
    if not np.isfinite(limit):
        return 0.0
    losses = [method.final_loss(rate).median for rate in method.rates]
    return decades_within(method.rates, losses, limit)


def median_curve(
    runs: Sequence[Result], position: Callable[[Result], np.ndarray], value: str, points: int = 100
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, median, lowest and highest value over runs, up to where the shortest run ends."""
    curves = [(position(result), getattr(result, value)) for result in runs]
    end = min(where[-1] for where, _ in curves)
    grid = np.linspace(0, end, points)
    values = np.array([np.interp(grid, where, what) for where, what in curves])
    return grid, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)
