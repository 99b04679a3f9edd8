"""What is on the page: the verdicts, each data set's figures and table, how it was measured."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from experiments.report import analysis, figures, verdicts
from experiments.report.analysis import DataSet, Method
from experiments.report.render import Figure, Section, Table
from experiments.report.results import Results
from experiments.report.statistics import Spread
from experiments.report.verdicts import Verdict
from experiments.sweeps.plan import Run

_MEASURED = (
    "Seconds are not the wall-clock of a run, which other load on the machine would blur: they are "
    "the sum over its steps of what a step of that batch size takes, the lower quartile over the "
    "steps of a run, the median over the runs of a data set whose steps compute the same (the "
    "plain gradient where the method needs no variance). Data, gradient, variance, update and "
    "metrics are in it; compilation and evaluation are not.",
    "Loss and accuracy are measured on the same examples of either split in every run. Runs of one "
    "seed start from the same parameters and see the examples in the same order. The best α of a "
    "method is that of the lowest median of the final training loss; an asterisk marks an end of "
    "the grid, beyond which a better one may lie. A diverged run counts as an infinite loss.",
    "Seeds of which runs are missing are left out of a data set, once one is whole.",
    "Examples to the target: where the loss first reaches it, its logarithm linear between "
    "evaluations.",
)


def sections(results: Results) -> list[Section]:
    """The sections of the report, in the order of the page."""
    found = analysis.data_sets(results)
    parts = [Section(paragraphs=(_status(results),), points=results.plan.notes)]
    if found:
        parts.append(Section(heading="Verdicts"))
        parts += map(_verdict, verdicts.verdicts(found))
        parts += map(_data_set, found)
        parts.append(Section(heading="How the verdicts follow", points=_criteria()))
    machines = dict.fromkeys(_machine(result.environment) for result in results.runs.values())
    parts.append(Section(heading="How it was measured", points=(*machines, *_MEASURED)))
    parts.append(_runs(results))
    return parts


def _status(results: Results) -> str:
    diverged = sum(bool(result.summary["diverged"]) for result in results.runs.values())
    status = f"{len(results.runs)} of {len(results.plan.runs)} runs, {diverged} of which diverged."
    if results.missing:
        status += " The sweep is unfinished: the missing runs are named at the end."
    return status


def _verdict(verdict: Verdict) -> Section:
    question = verdict.question
    rows = [(title, answer.verdict, answer.numbers) for title, answer in verdict.answers.items()]
    return Section(
        lead=question.name,
        paragraphs=(f"{question.question} {verdict.overall.capitalize()}{verdict.advice}.",),
        table=Table(("data set", "verdict", "numbers"), rows) if rows else None,
    )


def _criteria() -> tuple[str, ...]:
    return (
        *(f"{question.name}: {question.criteria}." for question in verdicts.QUESTIONS),
        f"Of several data sets that disagree the verdict is {verdicts.PARTLY}.",
    )


def _data_set(data: DataSet) -> Section:
    config = next(iter(data.methods.values())).config
    unit, limit = config.limit
    growth = verdicts.growth(data)
    setting = (
        f"{config.model}, width {config.width:g}, {limit:,} {unit} a run, {data.seeds} "
        f"seed{'s' if data.seeds > 1 else ''} (median; lines and bands from the lowest to the "
        f"highest). The target is a training loss of {data.target:.4g}, the median of where CABS "
        f"and the constant sizes end, each at its best α; the shared α is {data.shared_rate:g}."
    )
    curves = Figure(
        f"figures/{data.label}-curves.png",
        f"{data.title}: training loss and test accuracy against examples and seconds, batch sizes",
        figures.curves(data),
    )
    shown = [curves]
    if data.is_grid:
        caption = f"{data.title}: final loss and accuracy against the learning rate"
        path = f"figures/{data.label}-sensitivity.png"
        shown.append(Figure(path, caption, figures.sensitivity(data)))
    return Section(
        heading=data.title,
        paragraphs=(setting, *([f"CABS's batch size: {growth}."] if growth else [])),
        figures=tuple(shown),
        table=_methods(data),
    )


def _methods(data: DataSet) -> Table:
    """One row for each method: at its best α, at its fastest, at the shared one, and decades."""
    plain = analysis.plain(data.methods.values())
    header = (
        *("method", "best α", "loss", "test accuracy", "mean batch"),
        *("fastest α", "examples to target", "seconds"),
        *(f"at α = {data.shared_rate:g}: loss", "examples to target", "seconds"),
        *(("decades, 2× best of all", "2× own best", "1.25× own best") if data.is_grid else ()),
    )
    rows = [
        (
            method.title,
            _rate(method.best_rate, method),
            _loss(method.final_loss(method.best_rate)),
            _accuracy(method.final_accuracy(method.best_rate)),
            f"{method.mean_batch_size(method.best_rate).median:.0f}",
            _rate(method.fastest_rate(data.target), method),
            *_times(method, method.fastest_rate(data.target), data.target),
            *_at_shared(method, data),
            *(_decades(method, plain) if data.is_grid else ()),
        )
        for method in data.methods.values()
    ]
    return Table(header, rows)


def _machine(environment: dict[str, object]) -> str:
    return f"Machine: {', '.join(f'{key} {value}' for key, value in environment.items())}."


def _runs(results: Results) -> Section:
    diverged = [r.run for r in results.runs.values() if r.summary["diverged"]]
    lines = (*_named("missing", results.missing), *_named("diverged", diverged))
    none = () if lines else ("None is missing and none diverged.",)
    return Section(heading="Runs", paragraphs=none, points=lines)


def _named(what: str, runs: Iterable[Run]) -> list[str]:
    """One line for all methods of a data set of which the same runs are meant."""
    rates: dict[tuple[str, str], dict[int, list[str]]] = {}
    for run in runs:
        seeds = rates.setdefault((run.dataset, run.method), {})
        seeds.setdefault(run.config.seed, []).append(f"{run.learning_rate:g}")
    methods: dict[tuple[str, str], list[str]] = {}
    for (dataset, method), seeds in rates.items():
        where = "; ".join(f"seed {seed}, α {', '.join(alphas)}" for seed, alphas in seeds.items())
        methods.setdefault((dataset, where), []).append(method)
    return [
        f"{what}, {dataset}, {', '.join(names)}: {where}"
        for (dataset, where), names in methods.items()
    ]


def _at_shared(method: Method, data: DataSet) -> tuple[str, str, str]:
    rate = data.shared_rate
    if rate not in method.by_rate:
        return "", "", ""
    return _loss(method.final_loss(rate)), *_times(method, rate, data.target)


def _times(method: Method, rate: float, target: float) -> tuple[str, str]:
    return (
        _ranged(method.to_target(rate, target), lambda x: f"{round(x, -2):,.0f}"),
        _ranged(method.seconds_to_target(rate, target), lambda x: f"{x:.2f}"),
    )


def _rate(rate: float, method: Method) -> str:
    """The rate, marked where a better one may lie beyond the grid."""
    ends = method.rates[0], method.rates[-1]
    return f"{rate:g}" + ("*" if rate in ends and len(method.rates) > 1 else "")


def _decades(method: Method, plain: Sequence[Method]) -> tuple[str, ...]:
    numbers = (
        analysis.decades_of_best(method, plain),
        analysis.decades(method),
        analysis.decades(method, 1.25),
    )
    return tuple(f"{number:.2f}" for number in numbers)


def _loss(spread: Spread) -> str:
    return _ranged(spread, lambda x: f"{x:.3g}")


def _accuracy(spread: Spread) -> str:
    return _ranged(spread, lambda x: f"{x:.1%}")


def _ranged(spread: Spread, form: Callable[[float], str]) -> str:
    def show(value: float) -> str:
        return form(value) if np.isfinite(value) else "–"

    if spread.low == spread.high:
        return show(spread.median)
    return f"{show(spread.median)} ({show(spread.low)} to {show(spread.high)})"
