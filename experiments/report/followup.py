"""The plans that follow from a grid by the rules of experiments/results/PLAN.md, in TOML."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import analysis, study, verdicts
from experiments.report.analysis import DataSet, Method
from experiments.report.results import Results

_CHOSEN_HERE = {"title", "notes", "seeds", "learning_rates", "examples", "evaluations"}
SCHEDULES = ("step", "cosine")


def plans(parts: Sequence[Results], data_sets: Sequence[DataSet]) -> dict[str, str]:
    """The plans to run next on data sets whose grids are complete, by the names of their files.

    A grid whose best α lies at its edge is extended first, at most twice; then the finals follow
    and, where the plan asks for them, decreasing learning rates.
    """
    found: dict[str, str] = {}
    for data in data_sets:
        tuned = [method for method in data.tuning.values() if method.runs]
        complete = tuned and all(method.is_complete for method in data.tuning.values())
        if not (data.is_plain and data.asked and data.grid and complete):
            continue
        table = _Table(parts, data)
        if extended := {m.label: [rate] for m in tuned if (rate := _beyond(data, m)) is not None}:
            number = 1 + max(_extensions(data, method) for method in tuned)
            found[f"{data.label}_extension{number}.toml"] = table.extension(extended)
            continue
        if not analysis.of(data.finals, lambda config: not analysis.is_scheduled(config)):
            found[f"{data.label}_finals.toml"] = table.finals()
        if data.asked.schedules and "constant-16" in data.tuning:
            found |= _schedules(data, table)
    return found


def _beyond(data: DataSet, method: Method) -> float | None:
    """The rate by which to extend the grid of a method, or None."""
    if _extensions(data, method) >= study.MOST_EXTENSIONS:
        return None
    return method.choice().extend


def _extensions(data: DataSet, method: Method) -> int:
    return len(method.rates) - len(data.grid[method.label].rates)


def _schedules(data: DataSet, table: "_Table") -> dict[str, str]:
    """Decreasing rates with the first seed at three learning rates, then with all at the best."""
    scheduled = analysis.of(data.finals, analysis.is_scheduled)
    if not scheduled:
        best = data.tuning["constant-16"].choice().rate
        rates = {kind: [_short(factor * best) for factor in (1, 2, 4)] for kind in SCHEDULES}
        return {f"{data.label}_schedules1.toml": table.schedules(rates, table.asked.seeds[:1])}
    if all(len({run.config.seed for run in method.planned}) == 1 for method in scheduled):
        rates = {m.config.schedule: verdicts.settled(m).rates for m in scheduled if m.is_complete}
        if len(rates) == len(scheduled):
            return {f"{data.label}_schedules2.toml": table.schedules(rates, table.asked.seeds)}
    return {}


class _Table:
    """The grid's plan on one data set, from which the others are made."""

    def __init__(self, parts: Sequence[Results], data: DataSet):
        assert data.asked is not None
        self.data, self.asked = data, data.asked
        grid = next(iter(data.grid.values())).planned[0]
        text = next(part.plan_text for part in parts if grid in part.plan.runs)
        self.grid = tomllib.loads(text)

    def extension(self, rates: Mapping[str, Sequence[float]]) -> str:
        """The grid's runs at other learning rates."""
        methods = {label: self._method(label, rates[label]) for label in rates}
        seeds = sorted({r.config.seed for m in self.data.grid.values() for r in m.planned})
        config = next(iter(self.data.grid.values())).config
        options = {"seeds": seeds, "examples": config.examples, "evaluations": config.evaluations}
        return self._plan("learning rates beyond the grid", options, methods)

    def finals(self) -> str:
        """CABS and constant sizes at their best rates on fresh seeds."""
        tuning, methods = self.data.tuning, {}
        for method in analysis.of(tuning, analysis.is_cabs):
            methods[method.label] = self._method(method.label, [method.choice().rate])
        sizes, best = analysis.constants(tuning), analysis.best_constant(tuning)
        for method in sizes:
            rate = method.choice().rate
            if not self.asked.halved:
                methods[method.label] = self._method(method.label, [rate])
            elif best is not None and method.label in (best.label, sizes[-1].label):
                methods[method.label] = self._method(method.label, [_short(rate / 2), rate])
        return self._plan("finals", self._fresh(self.asked.seeds), methods)

    def schedules(self, rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> str:
        """Decreasing learning rates on constant 16."""
        methods = {
            f"constant-16-{kind}": self._method("constant-16", chosen)
            | {"title": f"constant 16, {kind} decay", "schedule": kind}
            for kind, chosen in rates.items()
        }
        return self._plan("decreasing learning rates", self._fresh(seeds), methods)

    def _fresh(self, seeds: Sequence[int]) -> dict[str, Any]:
        return {
            "seeds": list(seeds),
            "examples": self.asked.examples,
            "evaluations": self.asked.examples // study.POINTS_EVERY,
            "test_evaluations": study.LATE_ACCURACIES,
        }

    def _method(self, label: str, rates: Sequence[float]) -> dict[str, Any]:
        table: dict[str, Any] = self.grid["methods"][label]
        kept = {key: value for key, value in table.items() if key not in _CHOSEN_HERE - {"title"}}
        return kept | {"learning_rates": list(rates)} | {"method": table.get("method", label)}

    def _plan(self, what: str, options: dict[str, Any], methods: dict[str, dict[str, Any]]) -> str:
        top = {key: value for key, value in self.grid.items() if not isinstance(value, dict)}
        title = f"{self.data.title}: {what}"
        top |= {"title": title, "notes": self.grid.get("notes", []), **options}
        top.pop("learning_rates", None)
        label = self.data.label
        dataset = {
            key: value
            for key, value in self.grid["datasets"][label].items()
            if key not in _CHOSEN_HERE - {"title"} | {"methods", *options}
        }
        tables = {f"datasets.{json.dumps(label)}": dataset}
        tables |= {f"methods.{json.dumps(name)}": table for name, table in methods.items()}
        comment = (
            f"# Part {self.asked.part} of experiments/results/PLAN.md, {what}: what the grid leads "
            "to by its rules,\n# as `python -m experiments report … --next DIR` writes it.\n\n"
        )
        bodies = [f"[{name}]\n{_lines(table)}" for name, table in tables.items()]
        return comment + "\n".join([_lines(top), *bodies])


def _lines(table: Mapping[str, Any]) -> str:
    """The values of a table in TOML, which writes words, numbers and lists of them as JSON does."""
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in table.items())


def _short(rate: float) -> float:
    return float(f"{rate:.6g}")
