"""What a sweep is to run: methods × learning rates × seeds × data sets, given in TOML.

    examples = 20_000              # of every run: fields of RunConfig
    learning_rates = [0.03, 0.1, 0.3]
    seeds = [0, 1, 2]

    [datasets.digits]              # also sets the field `dataset`, unless it is given
    [datasets.mnist]
    examples = 60_000              # overrides what is above
    methods = ["cabs"]             # these only

    [methods.cabs]                 # also sets the field `method`, unless it is given
    [methods.constant-128]         # overrides what is above
    title = "constant 128"         # for reports
    method = "constant"
    batch_size = 128
    learning_rate_factor = 2       # times every learning rate

`learning_rates`, `seeds` and `title` may be given in any of the three places; `notes`, a list of
sentences for the report, at the top.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.training import methods as known_methods
from experiments.training import models
from experiments.training.config import RunConfig

_FIELDS = {field.name for field in dataclasses.fields(RunConfig)}
_SWEPT = {"learning_rate": "learning_rates", "seed": "seeds"}
_OPTIONS = _FIELDS - set(_SWEPT) | set(_SWEPT.values())
_KEYS = {
    "the sweep": _OPTIONS - {"dataset", "method"} | {"title", "notes", "datasets", "methods"},
    "datasets": _OPTIONS - {"method"} | {"title", "methods"},
    "methods": _OPTIONS - {"dataset"} | {"title", "learning_rate_factor"},
}
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class PlanError(ValueError):
    """The TOML asks for something that cannot be run."""


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
      dataset: Label of the data set, a key of the plan's `datasets`.
      method: Label of the method, a key of the plan's `methods`.
      learning_rate: The learning rate on the data set's grid, before the method's factor.
      config: The run itself.
    """

    dataset: str
    method: str
    learning_rate: float
    config: RunConfig

    @property
    def name(self) -> str:
        """The folder of the run, relative to the sweep's."""
        return f"{self.dataset}/{self.method}/lr-{self.learning_rate:g}-seed-{self.config.seed}"


class Plan(NamedTuple):
    """A sweep.

    Attributes:
      title: What the report is headed.
      notes: What its readers should know.
      datasets: Title of each data set by its label.
      methods: Title of each method by its label.
      runs: All runs, the first seed of everything first.
    """

    title: str
    notes: tuple[str, ...]
    datasets: dict[str, str]
    methods: dict[str, str]
    runs: tuple[Run, ...]


def parse(text: str) -> Plan:
    """Reads a plan.

    Raises:
      PlanError: It is no TOML, holds an unknown key, which is named, or an impossible value.
    """
    try:
        top = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"no TOML: {error}.") from error
    _check_keys(top, "the sweep", "the sweep")
    notes = top.get("notes", [])
    datasets, methods = _tables(top, "datasets"), _tables(top, "methods")
    common = {key: top[key] for key in top.keys() - {"datasets", "methods", "title", "notes"}}

    runs = []
    for dataset, dataset_table in datasets.items():
        for method in _methods_of(dataset, dataset_table, methods):
            options = {"dataset": dataset, "method": method, **common, **dataset_table}
            options |= methods[method] | {"method": methods[method].get("method", method)}
            runs += _grid(dataset, method, options)
    positions = {label: place for place, label in enumerate((*datasets, *methods))}
    # An interrupted sweep has the first seeds of all rather than all seeds of the first.
    runs.sort(
        key=lambda run: (
            run.config.seed,
            positions[run.dataset],
            run.learning_rate,
            positions[run.method],
        )
    )
    return Plan(
        title=_of_type(top.get("title", "Sweep"), str, "title"),
        notes=tuple(_of_type(note, str, "a note") for note in _of_type(notes, list, "notes")),
        datasets={label: table.get("title", label) for label, table in datasets.items()},
        methods={label: table.get("title", label) for label, table in methods.items()},
        runs=tuple(runs),
    )


def on_datasets(plan: Plan, labels: Sequence[str] | None) -> tuple[Run, ...]:
    """The runs on these data sets; None is all of them."""
    for label in labels or ():
        if label not in plan.datasets:
            raise PlanError(
                f"the plan has no data set {label!r}; it has {', '.join(plan.datasets)}."
            )
    return tuple(run for run in plan.runs if labels is None or run.dataset in labels)


def shard(runs: Sequence[Run], index: int, count: int) -> tuple[Run, ...]:
    """Part `index`, from 1, of `count`; each run is in exactly one of them."""
    if not 1 <= index <= count:
        raise PlanError(f"a shard is I/N with 1 <= I <= N, got {index}/{count}.")
    return tuple(runs[index - 1 :: count])


def _grid(dataset: str, method: str, options: dict[str, Any]) -> list[Run]:
    where = f"datasets.{dataset} with methods.{method}"
    rates = _numbers(options.pop("learning_rates", None), float, f"learning_rates of {where}")
    seeds = _numbers(options.pop("seeds", [0]), int, f"seeds of {where}")
    factor = _numbers([options.pop("learning_rate_factor", 1)], float, "learning_rate_factor")[0]
    for key in ("title", "methods"):
        options.pop(key, None)
    if options["method"] not in known_methods.METHODS:
        raise PlanError(
            f"{where}: unknown method {options['method']!r}; "
            f"known methods: {', '.join(known_methods.METHODS)}."
        )
    if options.get("model", models.NAMES[0]) not in models.NAMES:
        raise PlanError(
            f"{where}: unknown model {options['model']!r}; known models: {', '.join(models.NAMES)}."
        )
    try:
        return [
            Run(
                dataset,
                method,
                rate,
                RunConfig(learning_rate=float(f"{rate * factor:.6g}"), seed=seed, **options),
            )
            for rate in rates
            for seed in seeds
        ]
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {error}") from error


def _tables(top: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = _of_type(top.get(kind, {}), dict, kind)
    if not tables:
        raise PlanError(f"there is no [{kind}.NAME]: a sweep needs at least one.")
    for label, table in tables.items():
        if not _LABEL.fullmatch(label):
            raise PlanError(
                f"{kind}.{label!r} names a folder: use letters, digits, '.', '_', '-', and a title."
            )
        _check_keys(_of_type(table, dict, f"{kind}.{label}"), kind, f"{kind}.{label}")
        _of_type(table.get("title", ""), str, f"title of {kind}.{label}")
    return tables


def _methods_of(
    dataset: str, table: Mapping[str, Any], methods: Mapping[str, Any]
) -> Sequence[str]:
    chosen = _of_type(table.get("methods", list(methods)), list, f"methods of datasets.{dataset}")
    for label in chosen:
        if label not in methods:
            raise PlanError(f"datasets.{dataset} asks for {label!r}, but there is no such method.")
    return tuple(dict.fromkeys(chosen))


def _check_keys(table: Mapping[str, Any], kind: str, where: str) -> None:
    for key in table.keys() - _KEYS[kind]:
        hint = f"; give {_SWEPT[key]}, a list" if key in _SWEPT else ""
        raise PlanError(
            f"unknown key {key!r} in {where}{hint}; known keys: {', '.join(sorted(_KEYS[kind]))}."
        )


def _numbers(values: Any, kind: type, where: str) -> list[Any]:
    kinds = (int, float) if kind is float else int
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
        or len(set(values)) < len(values)
    ):
        raise PlanError(f"{where} must be a list of different numbers, got {values!r}.")
    return [kind(value) for value in values]


def _of_type(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise PlanError(f"{where} must be a {kind.__name__}, got {value!r}.")
    return value
