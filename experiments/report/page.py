"""The page itself: Markdown, and from it HTML with the figures inside."""

import base64
import html
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from markdown_it import MarkdownIt

from experiments.report import analysis, figures, verdicts
from experiments.report.analysis import DataSet, Method, Spread
from experiments.report.results import Results
from experiments.sweeps.plan import Run

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0 }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left }
img { max-width: 100% }
"""


class Page:
    """The report of one sweep.

    Attributes:
        figures: Each figure's PNG by its path relative to the page.
    """

    def __init__(self, results: Results):
        self._results = results
        self._data_sets = analysis.data_sets(results)
        self.figures: dict[str, bytes] = {}
        for data in self._data_sets:
            self.figures[f"figures/{data.label}-curves.png"] = figures.curves(data)
            if data.is_grid:
                self.figures[f"figures/{data.label}-sensitivity.png"] = figures.sensitivity(data)

    def markdown(self) -> str:
        """The page, its figures by path."""
        notes = "\n".join(f"- {note}" for note in self._results.plan.notes)
        parts = [f"# {self._results.plan.title}", self._status(), *([notes] if notes else [])]
        if self._data_sets:
            parts += ["## Verdicts", self.verdict_table(), self._criteria()]
        for data in self._data_sets:
            parts += self._section(data)
        parts += ["## How it was measured", self._method(), "## Runs", self._runs()]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The page as one file."""
        body = MarkdownIt("commonmark").enable("table").render(self.markdown())
        for path, figure in self.figures.items():
            data = base64.b64encode(figure).decode()
            body = body.replace(f'src="{path}"', f'src="data:image/png;base64,{data}"')
        title = html.escape(self._results.plan.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n"
            "</html>\n"
        )

    def verdict_table(self) -> str:
        """One row for each question and data set."""
        rows = []
        for verdict in verdicts.verdicts(self._data_sets):
            question = verdict.question
            rows.append(
                (f"**{question.name}** {question.question}", "", f"**{verdict.overall}**", "")
            )
            rows += [
                ("", title, answer.verdict, answer.numbers)
                for title, answer in verdict.answers.items()
            ]
        return _table(("question", "data set", "verdict", "numbers"), rows)

    def _status(self) -> str:
        runs, missing = self._results.runs, self._results.missing
        diverged = sum(bool(result.summary["diverged"]) for result in runs.values())
        status = (
            f"{len(runs)} of {len(self._results.plan.runs)} runs, {diverged} of which diverged."
        )
        if missing:
            status += " The sweep is unfinished: the missing runs are named at the end."
        return status

    def _criteria(self) -> str:
        return "\n".join(
            [
                *(f"- {q.name}: {q.criteria}." for q in verdicts.QUESTIONS),
                "- Of several data sets that disagree the verdict is `partly`.",
            ]
        )

    def _section(self, data: DataSet) -> list[str]:
        config = next(iter(data.methods.values())).config
        kind, limit = config.limit
        what = "examples" if kind == "examples" else "steps"
        growth = verdicts.growth(data)
        lines = [
            f"{config.model}, width {config.width:g}, {limit:,} {what} a run, {data.seeds} "
            f"seed{'s' if data.seeds > 1 else ''} (median; lines and bands from the lowest to the "
            f"highest). The target is a training loss of {data.target:.4g}, the median of where "
            "CABS and the constant sizes end, each at its best α; the shared α is "
            f"{data.shared_rate:g}."
        ]
        if growth:
            lines.append(f"CABS's batch size: {growth}.")
        shown = [
            f"![{data.title}: training loss and test accuracy against examples and seconds, batch "
            f"sizes](figures/{data.label}-curves.png)"
        ]
        if data.is_grid:
            shown.append(
                f"![{data.title}: final loss and accuracy against the learning rate]"
                f"(figures/{data.label}-sensitivity.png)"
            )
        return [f"## {data.title}", *lines, *shown, self._methods_table(data)]

    def _methods_table(self, data: DataSet) -> str:
        plain = [m for m in data.methods.values() if not analysis.is_variant(m)]
        header = (
            "method",
            "best α",
            "loss",
            "test accuracy",
            "mean batch",
            "fastest α",
            "examples to target",
            "seconds",
            f"at α = {data.shared_rate:g}: loss",
            "examples to target",
            "seconds",
            *(["decades, 2× best of all", "2× own best", "1.25× own best"] if data.is_grid else []),
        )
        rows: list[Sequence[str]] = []
        for method in data.methods.values():
            rate, fastest = method.best_rate, method.fastest_rate(data.target)
            rows.append(
                (
                    method.title,
                    _rate(rate, method),
                    _loss(method.final_loss(rate)),
                    _accuracy(method.final_accuracy(rate)),
                    f"{method.mean_batch_size(rate).median:.0f}",
                    _rate(fastest, method),
                    _count(method.to_target(fastest, data.target)),
                    _seconds(method.seconds_to_target(fastest, data.target)),
                    *_at_shared(method, data),
                    *(_decades(method, plain) if data.is_grid else ()),
                )
            )
        return _table(header, rows)

    def _method(self) -> str:
        environments: list[str] = []
        for result in self._results.runs.values():
            text = ", ".join(f"{key} {value}" for key, value in result.environment.items())
            if text not in environments:
                environments.append(text)
        return "\n".join(
            [
                *(f"- Machine: {text}." for text in environments),
                "- Seconds are not the wall-clock of a run, which other load on the machine would "
                "blur: they are the sum over its steps of what a step of that batch size takes, "
                "the lower quartile over the steps of a run, the median over the runs of a data "
                "set whose steps compute the same (the plain gradient where the method needs no "
                "variance). Data, gradient, variance, update and metrics are in it; compilation "
                "and evaluation are not.",
                "- Loss and accuracy are measured on the same examples of either split in every "
                "run. Runs of one seed start from the same parameters and see the examples in the "
                "same order. The best α of a method is that of the lowest median of the final "
                "training loss; an asterisk marks an end of the grid, beyond which a better one "
                "may lie. A diverged run counts as an infinite loss.",
                "- Seeds of which runs are missing are left out of a data set, once one is whole.",
                "- Examples to the target: where the loss first reaches it, its logarithm linear "
                "between evaluations.",
            ]
        )

    def _runs(self) -> str:
        diverged = [r.run for r in self._results.runs.values() if r.summary["diverged"]]
        lines = [*_named("missing", self._results.missing), *_named("diverged", diverged)]
        return "\n".join(lines) or "None is missing and none diverged."


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
        f"- {what}, {dataset}, {', '.join(names)}: {where}"
        for (dataset, where), names in methods.items()
    ]


def _at_shared(method: Method, data: DataSet) -> tuple[str, str, str]:
    rate = data.shared_rate
    if rate not in method.by_rate:
        return "", "", ""
    return (
        _loss(method.final_loss(rate)),
        _count(method.to_target(rate, data.target)),
        _seconds(method.seconds_to_target(rate, data.target)),
    )


def _rate(rate: float, method: Method) -> str:
    """The rate, marked where a better one may lie beyond the grid."""
    ends = method.rates[0], method.rates[-1]
    return f"{rate:g}" + ("*" if rate in ends and len(method.rates) > 1 else "")


def _decades(method: Method, plain: Sequence[Method]) -> list[str]:
    numbers = (
        analysis.decades_of_best(method, plain),
        analysis.decades(method),
        analysis.decades(method, 1.25),
    )
    return [f"{number:.2f}" for number in numbers]


def _loss(spread: Spread) -> str:
    return _ranged(spread, lambda x: f"{x:.3g}")


def _accuracy(spread: Spread) -> str:
    return _ranged(spread, lambda x: f"{x:.1%}")


def _count(spread: Spread) -> str:
    return _ranged(spread, lambda x: f"{round(x, -2):,.0f}")


def _seconds(spread: Spread) -> str:
    return _ranged(spread, lambda x: f"{x:.2f}")


def _ranged(spread: Spread, form: Callable[[float], str]) -> str:
    def show(value: float) -> str:
        return form(value) if np.isfinite(value) else "–"

    if spread.low == spread.high:
        return show(spread.median)
    return f"{show(spread.median)} ({show(spread.low)} to {show(spread.high)})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
