"""The questions of the study's plan, each answered by its rule from the numbers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report import analysis, intervals, statistics
from experiments.report.analysis import UNITS, WEIGHTS, Clock, DataSet, Method
from experiments.report.intervals import CONFIRMED, CONTRADICTED, UNDECIDED, Interval
from experiments.report.results import Result
from experiments.report.statistics import Reached

NOT_RUN = "not run"
MARGIN = 1.05  # losses within it of the best schedule's count as good
POINTS = 0.01  # so do accuracies within it of the best constant size's


class Found(NamedTuple):
    """What the runs say.

    Attributes:
      verdict: `CONFIRMED`, `CONTRADICTED`, `UNDECIDED` or `NOT_RUN`.
      numbers: What it follows from; where it was not run, what is missing.
      remarks: On which part of the runs it rests, and how many seeds would decide.
    """

    verdict: str
    numbers: str
    remarks: tuple[str, ...] = ()


class Answer(NamedTuple):
    """Of one method on one data set at one kind of weights, "w" or "w̄"."""

    data: str
    method: str
    weights: str
    found: Found


class Question(NamedTuple):
    """A question, the rule that decides it, and what the runs say; None where it is not asked."""

    name: str
    question: str
    criteria: str
    find: Callable[[DataSet, Method, str], Found | None]


class Pairs(NamedTuple):
    """Runs of the finals that are compared.

    Attributes:
      own: The method that the question is about.
      rivals: Those that it is compared with, each at the learning rates that count for it.
      seeds: Those that all of them have.
      remarks: Says so where more are planned.
    """

    own: Method
    rivals: list[Method]
    seeds: list[int]
    remarks: tuple[str, ...]


class Best(NamedTuple):
    """The method, learning rate and weights whose values have the lowest mean over seeds."""

    title: str
    runs: list[Result]
    weights: str
    values: np.ndarray


def answers(question: Question, data_sets: Sequence[DataSet]) -> list[Answer]:
    """Of each CABS on each data set, at w and at w̄."""
    return [
        Answer(data.title, own.title, weights, found)
        for data in data_sets
        for own in analysis.of({**data.finals, **data.grid}, analysis.is_cabs)
        for weights in WEIGHTS
        if (found := question.find(data, own, weights)) is not None
    ]


def overall(given: Sequence[Answer]) -> str:
    """What w and w̄ amount to together: no claim holds that holds for one of them alone."""
    verdicts = {answer.found.verdict for answer in given}
    if len(verdicts) == 1:
        return verdicts.pop()
    alone = [answer.weights for answer in given if answer.found.verdict == CONFIRMED]
    if alone:
        return f"does not hold: confirmed at {alone[0]} alone"
    return CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED


def _speed(data: DataSet, own: Method, weights: str) -> Found | None:
    """Costs to the targets, relative to those of the best tuned constant size."""
    if not data.is_plain or data.asked is None:
        return None
    pairs = _pairs(data, own, _best_constants(data), weights)
    if isinstance(pairs, Found):
        return pairs
    first = min(analysis.untrained(r) for m in (pairs.own, *pairs.rivals) for r in m.all_runs())
    targets = [target for target in data.asked.targets if target < first]
    told, decided = [], None
    for unit in UNITS:
        raced = _race(pairs, targets, unit, data.clock, weights)
        if raced is None:
            told.append(f"{unit} not measured: give --clock")
            continue
        found, rival = raced
        if found is None:
            return Found(UNDECIDED, "neither side reaches a target", pairs.remarks)
        told.append(f"{unit} {_times(found.log_ratio)} those of {rival}")
        if decided is None:
            decided = intervals.decide(found.log_ratio, 0.0)
            times = len(found.targets) * len(pairs.seeds)
            bounds = (
                f"targets {', '.join(f'{target:g}' for target in found.targets)}; of {times} "
                f"times {found.ours_unreached} of ours and {found.theirs_unreached} of theirs are "
                "bounds, the whole budget"
            )
    assert decided is not None  # examples need no clock
    return Found(decided.verdict, "; ".join((*told, bounds)), (*pairs.remarks, *_seeds(decided)))


def _race(
    pairs: Pairs, targets: Sequence[float], unit: str, clock: Clock, weights: str
) -> tuple[intervals.Comparison | None, str] | None:
    """The comparison and whom with, or None where no clock tells the costs."""

    def reached(run: Result, name: str) -> list[Reached]:
        where = analysis.positions(run, unit, clock)
        assert where is not None
        losses = analysis.losses(run, name)
        return [statistics.time_to_target(where, losses, target) for target in targets]

    def mean_log(run: Result, name: str) -> float:
        return float(np.sum([np.log(time.cost) for time in reached(run, name)]))

    runs = [run for method in (pairs.own, *pairs.rivals) for run in method.all_runs()]
    if any(analysis.positions(run, unit, clock) is None for run in runs):
        return None
    sides = [_best(ms, pairs.seeds, weights, mean_log) for ms in ([pairs.own], pairs.rivals)]
    ours, theirs = (
        list(zip(*(reached(run, side.weights) for run in side.runs), strict=True)) for side in sides
    )
    return intervals.compare(ours, theirs, targets), sides[1].title


def _schedules(data: DataSet, own: Method, weights: str) -> Found | None:
    """The final loss, relative to that of the best decreasing learning rate."""
    scheduled = [m for m in data.finals.values() if analysis.is_scheduled(m.config)]
    if not data.is_plain or not (scheduled or (data.asked and data.asked.schedules)):
        return None
    pairs = _pairs(data, own, scheduled, weights)
    if isinstance(pairs, Found):
        return pairs
    ours, theirs = (
        _best(methods, pairs.seeds, weights, analysis.log_final)
        for methods in ([pairs.own], pairs.rivals)
    )
    interval = intervals.t_interval(ours.values - theirs.values)
    decided = intervals.decide(interval, float(np.log(MARGIN)))
    numbers = (
        f"final loss {np.exp(ours.values.mean()):.3g}, {_times(interval)} the "
        f"{np.exp(theirs.values.mean()):.3g} of {theirs.title}"
    )
    return Found(decided.verdict, numbers, (*pairs.remarks, *_seeds(decided)))


def _sensitivity(data: DataSet, own: Method, weights: str) -> Found | None:
    """The mean over the grid of ln(final loss / best of all), beside that of every other method."""
    methods = {m.label: m for m in data.grid.values() if not analysis.is_scheduled(m.config)}
    others = [m for m in methods.values() if not analysis.is_cabs(m.config)]
    if not others or own.label not in methods:
        return None
    if any(weights not in method.weights for method in methods.values()):
        return Found(NOT_RUN, "averaged weights were not kept; set averages = true")
    seeds, found = analysis.sensitivity(data, weights)
    planned = sorted({run.config.seed for m in methods.values() for run in m.planned})
    if not found:
        done, all_runs = analysis.progress(methods.values())
        return Found(NOT_RUN, f"{done} of the {all_runs} runs of the grid; no seed has all of its")
    differences = {
        other.title: intervals.t_interval(found[own.label].excess - found[other.label].excess)
        for other in others
    }
    each = {title: intervals.decide(interval, 0.0) for title, interval in differences.items()}
    verdicts = {decided.verdict for decided in each.values()}
    if CONTRADICTED in verdicts:
        verdict = CONTRADICTED
    else:
        verdict = CONFIRMED if verdicts == {CONFIRMED} else UNDECIDED
    needed = [_seeds(decided) for decided in each.values() if decided.verdict == UNDECIDED]
    numbers = (
        f"{np.exp(found[own.label].excess.mean()):.3g}× the best loss of all over the grid; "
        + "relative to "
        + "; ".join(
            f"{title} {_times(interval)}, {each[title].verdict}"
            for title, interval in differences.items()
        )
    )
    if data.asked is not None:
        numbers += f"; decades of α with a loss of at most {data.asked.good:g}: " + ", ".join(
            f"{method.title} {found[label].decades:.2f}" for label, method in methods.items()
        )
    asks = max(needed, key=_asked_for, default=()) if verdict == UNDECIDED else ()
    return Found(verdict, numbers, (*_partial(seeds, planned), *asks))


def _accuracy(data: DataSet, own: Method, weights: str) -> Found | None:
    """The difference in test accuracy to the best tuned constant size."""
    if not data.is_plain:
        return None
    pairs = _pairs(data, own, _best_constants(data), weights)
    if isinstance(pairs, Found):
        return pairs

    def missed(run: Result, name: str) -> float:
        return 1 - analysis.accuracy(run, name)

    ours, theirs = (
        _best(methods, pairs.seeds, weights, missed) for methods in ([pairs.own], pairs.rivals)
    )
    gain = theirs.values - ours.values
    measured = gain[~np.isnan(gain)]
    if not len(measured):
        return Found(NOT_RUN, "no test accuracy was measured in the last three evaluations")
    if len(measured) < len(gain):
        ended = (f"{len(gain) - len(measured)} seeds left out, whose runs ended early",)
        pairs = pairs._replace(remarks=(*pairs.remarks, *ended))
    interval = intervals.t_interval(measured)
    decided = intervals.decide(interval, -POINTS, "above")
    points = [f"{100 * x:+.1f}" for x in (interval.mean, interval.low, interval.high)]
    numbers = (
        f"{1 - np.nanmean(ours.values):.1%}, {points[0]} points ({points[1]} to {points[2]}) on "
        f"the {1 - np.nanmean(theirs.values):.1%} of {theirs.title}"
    )
    return Found(decided.verdict, numbers, (*pairs.remarks, *_seeds(decided)))


def _best_constants(data: DataSet) -> list[Method]:
    """The constant size that the grid found best, as the finals ran it; without a grid, all."""
    best = analysis.best_constant(data.tuning)
    return [
        method
        for method in data.finals.values()
        if analysis.is_constant(method.config) and (best is None or method.label == best.label)
    ]


def _pairs(data: DataSet, own: Method, rivals: list[Method], weights: str) -> Pairs | Found:
    """The finals of both sides, or what is missing."""
    mine = data.finals.get(own.label)
    if mine is None or not rivals:
        lacking = own.title if mine is None else "what it is compared with"
        return Found(NOT_RUN, f"no finals of {lacking} in the plans given; --next writes them")
    sides = [mine, *map(settled, rivals)]
    if any(weights not in method.weights for method in sides):
        return Found(NOT_RUN, "averaged weights were not kept; set averages = true")
    wanted = [
        (method, rate, {run.config.seed for run in method.planned if run.learning_rate == rate})
        for method in sides
        for rate in {run.learning_rate for run in method.planned}
    ]
    planned = set.intersection(*(seeds for *_, seeds in wanted))
    made = set.intersection(*(set(method.runs.get(rate, {})) for method, rate, _ in wanted))
    if not made & planned:
        done, all_runs = analysis.progress(sides)
        return Found(
            NOT_RUN, f"{done} of the {all_runs} runs of the finals; no seed has both sides"
        )
    seeds = sorted(made & planned)
    return Pairs(sides[0], sides[1:], seeds, _partial(seeds, sorted(planned)))


def settled(method: Method) -> Method:
    """A decreasing learning rate at that start which its first seed found best; else the same."""
    if not analysis.is_scheduled(method.config) or not method.runs:
        return method
    first = min(run.config.seed for run in method.planned)
    losses = {
        rate: analysis.log_final(seeds[first], analysis.LAST)
        for rate, seeds in method.runs.items()
        if first in seeds
    }
    if not losses:
        return method
    rate = min(losses, key=lambda rate: losses[rate])
    planned = tuple(run for run in method.planned if run.learning_rate == rate)
    return method._replace(planned=planned, runs={rate: method.runs[rate]})


def _best(
    methods: Sequence[Method],
    seeds: Sequence[int],
    weights: str,
    measure: Callable[[Result, str], float],
) -> Best:
    options = []
    for method in methods:
        for rate, by_seed in method.runs.items():
            runs = [by_seed[seed] for seed in seeds]
            title = f"{method.title} at α = {rate:g}"
            for name in WEIGHTS[weights]:
                values = np.array([measure(run, name) for run in runs])
                options.append(Best(title, runs, name, values))
    return min(options, key=lambda option: float(np.nan_to_num(option.values.mean(), nan=np.inf)))


def _partial(seeds: Sequence[int], planned: Sequence[int]) -> tuple[str, ...]:
    if list(seeds) == list(planned):
        return ()
    return (f"partial: seeds {_listed(seeds)} of {_listed(planned)}",)


def _seeds(decided: intervals.Verdict) -> tuple[str, ...]:
    if decided.verdict != UNDECIDED:
        return ()
    needed = decided.seeds_to_decide or f"more than {intervals.MOST_SEEDS}"
    return (f"{needed} seeds would decide",)


def _asked_for(remarks: tuple[str, ...]) -> float:
    number = remarks[0].split()[0]
    return float(number) if number.isdigit() else np.inf


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _times(interval: Interval) -> str:
    """The interval of a logarithm as that of a ratio."""
    mean, low, high = np.exp([interval.mean, interval.low, interval.high])
    return f"{mean:.2f}× ({low:.2f} to {high:.2f})" if interval.seeds > 1 else f"{mean:.2f}×"


_ELSE = "contradicted where the interval lies on the other side, else undecided"
QUESTIONS = (
    Question(
        "RQ1",
        "Does it reach a training loss with fewer examples than the best tuned constant size?",
        "the geometric mean over targets of the examples relative to the best constant size, at "
        "the better of its best α and half of it; confirmed if the interval of its logarithm lies "
        f"below 0, {_ELSE}. A target not reached counts as the whole budget, one that neither side "
        "reaches is dropped. Steps and seconds are reported likewise",
        _speed,
    ),
    Question(
        "RQ2",
        "Is its final loss as good as that of the best decreasing learning rate?",
        "the final loss relative to that of the better of step and cosine decay on constant 16; "
        f"confirmed if the upper bound is at most {MARGIN}, {_ELSE}",
        _schedules,
    ),
    Question(
        "RQ3",
        "Does its result depend less on the learning rate?",
        "the mean over the grid of ln(final loss / best of all), no loss above the untrained "
        "net's, per seed, less that of every constant size and of the norm test; confirmed if "
        "every interval lies below 0, contradicted if one lies above, else undecided",
        _sensitivity,
    ),
    Question(
        "RQ4",
        "Is its test accuracy no worse?",
        "the difference to the best constant size, at the better of its best α and half of it; "
        f"confirmed if the lower bound is at least −1 point, {_ELSE}",
        _accuracy,
    ),
)
