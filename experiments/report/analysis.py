"""The runs of each method on each data set, and what they measured."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report import statistics, study
from experiments.report.devices import StepCost, fit_step_cost
from experiments.report.results import Result, Results
from experiments.report.statistics import Choice
from experiments.sweeps.plan import Run
from experiments.training import averages
from experiments.training.config import SMALLEST_NUMBER, RunConfig
from experiments.training.shared_programs import measured_variance

FEWEST_RATES = 3  # that make a grid
LAST = "last"
# Answers at averaged weights take, for each method, the average that suits it better.
WEIGHTS = {"w": (LAST,), "w̄": averages.NAMES}
UNITS = ("examples", "seconds", "steps")
_FAMILIES = {"_momentum": "momentum", "_adam": "Adam"}


class Clock:
    """Seconds of a step by its kind and batch size, on a machine with nothing else to do.

    Args:
      runs: Runs that had the machine for themselves. Of several of a kind the quickest counts:
        other load only adds.
    """

    def __init__(self, runs: Iterable[Result]):
        self._seconds: dict[Any, dict[int, float]] = {}
        for result in runs:
            steps = self._seconds.setdefault(_kind(result.run, result.run.config), {})
            for size, seconds in result.step_seconds.items():
                steps[size] = min(seconds, steps.get(size, np.inf))

    def of(self, run: Run) -> dict[int, float]:
        """Of the steps of this run, ξ being measured only where the method needs it; or empty."""
        kind = _kind(run, dataclasses.replace(run.config, record_variance=False))
        return dict(sorted(self._seconds.get(kind, {}).items()))

    def step_cost(self, run: Run) -> StepCost | None:
        """The line a + b·m through them, or None where there are less than two sizes."""
        steps = self.of(run)
        if len(steps) < 2:
            return None
        return fit_step_cost(list(steps), np.array(list(steps.values())))

    def seconds(self, result: Result) -> np.ndarray | None:
        """Seconds before each evaluation, (e,); linear in m between the sizes measured."""
        if not (steps := self.of(result.run)):
            return None
        sizes, seconds = np.array(list(steps), float), np.array(list(steps.values()))

        def cost(size: int) -> float:  # beyond the largest size, in proportion to it
            return float(np.interp(size, sizes, seconds) * max(1.0, size / sizes[-1]))

        made = [sum(count * cost(size) for size, count in i.items()) for i in result.sizes]
        return np.cumsum(made)


def _kind(run: Run, config: RunConfig) -> tuple[Any, ...]:
    net = run.dataset, config.model, config.width
    return *net, measured_variance(config), config.gated


def positions(result: Result, unit: str, clock: Clock) -> np.ndarray | None:
    """Examples, seconds or steps before each evaluation, (e,); None where no clock tells."""
    if unit == "seconds":
        return clock.seconds(result)
    if unit == "examples":
        return result.examples
    return np.cumsum([float(sum(interval.values())) for interval in result.sizes])


def losses(result: Result, weights: str) -> np.ndarray:
    """Training losses at the last weights, or at an average of them, (e,)."""
    return result.train_loss if weights == LAST else result.averaged[weights][0]


def accuracy(result: Result, weights: str) -> float:
    """Test accuracy, the last three evaluations averaged; NaN where none measured it."""
    if weights == LAST:
        return statistics.late_accuracy(result.test_accuracy)
    return statistics.late_accuracy(result.averaged[weights][1])


def untrained(result: Result) -> float:
    """The loss before the first step."""
    return max(float(np.nan_to_num(result.train_loss[0], nan=1.0)), SMALLEST_NUMBER)


def log_final(result: Result, weights: str) -> float:
    """The logarithm of the median of the last three losses; diverged, of the untrained net's."""
    last = float(statistics.running_median(losses(result, weights))[-1])
    lost = result.summary["diverged"] or not np.isfinite(last)
    return float(np.log(untrained(result) if lost else max(last, SMALLEST_NUMBER)))


def mean_size(result: Result) -> float:
    """Examples over steps."""
    return float(result.summary["examples"] / result.summary["steps"])


class Method(NamedTuple):
    """The runs of one method on one data set.

    Attributes:
      label: Its label in the plan.
      title: Its name in reports.
      planned: All runs that plans ask for.
      runs: The finished ones: {learning rate: {seed: result}}, increasing.
    """

    label: str
    title: str
    planned: tuple[Run, ...]
    runs: dict[float, dict[int, Result]]

    @property
    def config(self) -> RunConfig:
        """That of one of its runs."""
        return self.planned[0].config

    @property
    def rates(self) -> list[float]:
        """The learning rates that have finished runs, increasing."""
        return list(self.runs)

    @property
    def is_complete(self) -> bool:
        """Whether all of its runs have finished."""
        return len(self.planned) == sum(map(len, self.runs.values()))

    @property
    def weights(self) -> list[str]:
        """The answers that its runs can give: at w, and at w̄ where averages were kept."""
        kept = all(result.averaged.keys() >= set(averages.NAMES) for result in self.all_runs())
        return [name for name in WEIGHTS if name == "w" or kept]

    def all_runs(self) -> list[Result]:
        """The finished runs."""
        return [result for seeds in self.runs.values() for result in seeds.values()]

    def at(self, rate: float, weights: str, measure: Callable[[Result, str], float]) -> np.ndarray:
        """What each seed measured, (seeds,), at the weights that make the mean the lowest."""
        runs = self.runs[rate].values()
        values = [np.array([measure(r, name) for r in runs]) for name in WEIGHTS[weights]]
        return min(values, key=lambda each: float(np.nan_to_num(np.mean(each), nan=np.inf)))

    def accuracies(self, rate: float, weights: str) -> np.ndarray:
        """Test accuracies, (seeds,); NaN where they were not measured."""
        return -self.at(rate, weights, lambda result, name: -accuracy(result, name))

    def choice(self) -> Choice:
        """The learning rate of the lowest mean of ln final loss at w."""
        means = [float(np.mean(self.at(rate, "w", log_final))) for rate in self.rates]
        if len(self.rates) < 2:
            return Choice(self.rates[0], None)
        found = statistics.choose_rate(self.rates, np.exp(means)[:, None])
        return found if self.is_complete else found._replace(extend=None)

    def size(self, rate: float) -> float:
        """The mean over seeds of the mean batch size."""
        return float(np.mean([mean_size(result) for result in self.runs[rate].values()]))

    def missing(self, seed: int) -> list[Run]:
        """The planned runs of this seed that have not finished."""
        made = {(rate, seed) for rate, seeds in self.runs.items() for seed in seeds}
        return [
            run
            for run in self.planned
            if run.config.seed == seed and (run.learning_rate, seed) not in made
        ]


class DataSet(NamedTuple):
    """All that was measured on one data set with one kind of descent.

    Attributes:
      label: Its label in the plans.
      title: Its name in reports.
      is_plain: Whether the runs are of gradient descent without momentum.
      asked: What the study's plan asks, or None.
      grid: Methods by label, over the grid of learning rates, as it was planned first.
      tuning: The same, with the runs that extend the grid: α is chosen on these.
      finals: Methods by label, on fresh seeds.
      clock: Of its steps.
    """

    label: str
    title: str
    is_plain: bool
    asked: study.Asked | None
    grid: dict[str, Method]
    tuning: dict[str, Method]
    finals: dict[str, Method]
    clock: Clock

    @property
    def name(self) -> str:
        """Of its files."""
        return self.label if self.is_plain else f"{self.label}-{_family(self._config)}".lower()

    @property
    def _config(self) -> RunConfig:
        return next(iter((self.grid or self.finals).values())).config

    @property
    def setting(self) -> str:
        """The net, in words."""
        return f"{self._config.model}, width {self._config.width:g}"


def progress(methods: Iterable[Method]) -> tuple[int, int]:
    """How many runs of these methods have finished, and of how many."""
    counts = [(len(method.all_runs()), len(method.planned)) for method in methods]
    return sum(done for done, _ in counts), sum(planned for _, planned in counts)


def data_sets(parts: Sequence[Results], clock: Clock) -> list[DataSet]:
    """The data sets that have finished runs, in the order of the plans.

    Args:
      parts: Sweeps of different plans. The first to have three learning rates on a data set is its
        grid; runs of other plans with the grid's seeds extend it, those with fresh seeds are
        finals.
      clock: Of the steps.
    """
    keys = dict.fromkeys(_key(run) for part in parts for run in part.plan.runs)
    found = [_data_set(key, parts, clock) for key in keys]
    return [d for d in found if any(m.runs for m in (*d.grid.values(), *d.finals.values()))]


def _key(run: Run) -> tuple[str, str, float, str]:
    return run.dataset, run.config.model, run.config.width, _family(run.config)


def _family(config: RunConfig) -> str:
    return next((name for end, name in _FAMILIES.items() if config.method.endswith(end)), "")


def _data_set(key: Any, parts: Sequence[Results], clock: Clock) -> DataSet:
    label, *_, family = key
    own = [
        (part, [run for run in part.plan.runs if _key(run) == key])
        for part in parts
        if label in part.plan.datasets
    ]
    on_grid = next((each for each in own if _is_grid(each[1])), None)
    grid_runs = on_grid[1] if on_grid else []
    seeds = {run.config.seed for run in grid_runs}
    # By what they are: two plans may ask for the same run.
    everything = {(run.name, run.config): (part, run) for part, runs in own for run in runs}

    def chosen(belongs: Callable[[Run], bool]) -> dict[str, Method]:
        return _methods([each for each in everything.values() if belongs(each[1])])

    planned = {(run.name, run.config) for run in grid_runs}
    title = next(part.plan.datasets[label] for part, _ in own)
    return DataSet(
        label,
        f"{title}, {family}" if family else title,
        not family,
        study.BY_DATA_SET.get(label),
        _comparable(chosen(lambda run: (run.name, run.config) in planned), seeds),
        _comparable(chosen(lambda run: run.config.seed in seeds), seeds),
        chosen(lambda run: run.config.seed not in seeds),
        clock,
    )


def _is_grid(runs: Sequence[Run]) -> bool:
    rates: dict[str, set[float]] = {}
    for run in runs:
        if not is_scheduled(run.config):
            rates.setdefault(run.method, set()).add(run.learning_rate)
    return max(map(len, rates.values()), default=0) >= FEWEST_RATES


def _methods(planned: Sequence[tuple[Results, Run]]) -> dict[str, Method]:
    """The methods by label, those without finished runs, too."""
    methods: dict[str, Method] = {}
    for part, run in sorted(planned, key=lambda each: (each[1].learning_rate, each[1].config.seed)):
        title = part.plan.methods[run.method]
        before = methods.get(run.method, Method(run.method, title, (), {}))
        if run.name in part.runs:
            before.runs.setdefault(run.learning_rate, {})[run.config.seed] = part.runs[run.name]
        methods[run.method] = before._replace(planned=(*before.planned, run))
    order = dict.fromkeys(label for part, _ in planned for label in part.plan.methods)
    return {label: methods[label] for label in order if label in methods}


def _comparable(methods: dict[str, Method], seeds: Iterable[int]) -> dict[str, Method]:
    """With the runs of whole seeds only, as soon as one is whole.

    Means over other seeds for one method than for another would compare the seeds.
    """
    whole = {seed for seed in seeds if not any(m.missing(seed) for m in methods.values())}
    if not whole:
        return methods
    return {
        label: method._replace(
            runs={
                rate: {seed: result for seed, result in runs.items() if seed in whole}
                for rate, runs in method.runs.items()
                if runs.keys() & whole
            }
        )
        for label, method in methods.items()
    }


def is_scheduled(config: RunConfig) -> bool:
    """Whether its learning rate decreases by plan."""
    return config.schedule != "constant"


def is_constant(config: RunConfig) -> bool:
    """Whether batch size and learning rate are constant."""
    return config.fixed_size and not is_scheduled(config)


def is_cabs(config: RunConfig) -> bool:
    """Whether it is CABS, as published or estimated, in front of whatever descent."""
    return config.method.startswith("cabs")


def of(methods: dict[str, Method], belongs: Callable[[RunConfig], bool]) -> list[Method]:
    """Those methods of a kind that have finished runs."""
    return [method for method in methods.values() if method.runs and belongs(method.config)]


def constants(methods: dict[str, Method]) -> list[Method]:
    """The constant sizes, increasing."""
    return sorted(of(methods, is_constant), key=lambda method: method.config.batch_size)


def best_constant(methods: dict[str, Method]) -> Method | None:
    """The constant size of the lowest mean of ln final loss at w, each at its best α."""

    def lowest(method: Method) -> float:
        return float(np.mean(method.at(method.choice().rate, "w", log_final)))

    return min(constants(methods), key=lowest, default=None)


class Sensitivity(NamedTuple):
    """How much a method loses by a bad α.

    Attributes:
      excess: The mean over the grid of ln(final loss / best of all), no loss above the untrained
        net's, (seeds,).
      decades: Of the learning rate whose loss is good, by the plan; NaN where it asks for none.
    """

    excess: np.ndarray
    decades: float


def sensitivity(data: DataSet, weights: str) -> tuple[list[int], dict[str, Sensitivity]]:
    """That of each method at a constant learning rate, over the grid as it was planned first.

    Returns:
      The seeds that every method has at every rate, and the methods by label; nothing where there
      is no such seed, or no grid.
    """
    methods = [m for m in data.grid.values() if not is_scheduled(m.config)]
    planned = [{run.learning_rate for run in method.planned} for method in methods]
    rates = sorted(set.intersection(*planned)) if planned else []
    made = [set(method.runs.get(rate, {})) for method in methods for rate in rates]
    seeds = sorted(set.intersection(*made)) if made else []
    if len(rates) < FEWEST_RATES or not seeds:
        return [], {}
    logs = {  # of each method: (averages, seeds, rates)
        method.label: np.array(
            [
                [[log_final(method.runs[rate][seed], name) for rate in rates] for seed in seeds]
                for name in WEIGHTS[weights]
            ]
        )
        for method in methods
    }
    best = np.min([log.min(axis=(0, 2)) for log in logs.values()], axis=0)  # (seeds,)
    start = np.array([untrained(methods[0].runs[rates[0]][seed]) for seed in seeds])
    found = {}
    for label, log in logs.items():
        excess = statistics.log_excess(np.exp(log), np.exp(best), start)
        which = int(np.argmin(excess.mean(axis=1)))
        over_seeds = np.exp(log[which].mean(axis=0))
        good = statistics.decades_within(rates, over_seeds, data.asked.good) if data.asked else None
        found[label] = Sensitivity(excess[which], float("nan") if good is None else good)
    return seeds, found
