"""The runs of a sweep, thinned: read from its folder or from one compact file, and written there.

The compact file has one JSON object a line: first the plan, then one for each finished run.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.sweeps import plan as plans
from experiments.sweeps import sweep
from experiments.training import averages, run_folder
from experiments.training.config import LARGEST_NUMBER, RunConfig

FILE = "results.jsonl"
CURVE_POINTS = 40
_DEFAULTS = dataclasses.asdict(RunConfig())
# What reading JSON that is not ours ends in; Python's own messages say what is wrong with it.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Result(NamedTuple):
    """One finished run.

    Attributes:
      run: What was run.
      summary: As the run wrote it.
      examples: Examples seen at each evaluation, (e,).
      train_loss: On a fixed part of the training examples, (e,); NaN once diverged.
      test_accuracy: Likewise, of the test examples; NaN where it was not measured.
      averaged: {name of averaged weights: (their training losses, their test accuracies)}, alike;
        empty where none were kept.
      variance: Mean gradient variance ξ in each of `CURVE_POINTS` equal stretches of the run; NaN
        where it was not measured.
      sizes: For each evaluation, {batch size: steps since the one before}.
      step_seconds: {batch size: lower quartile of the seconds between such a step and the next};
        sizes that few steps had are left out.
      batch_sizes: The mean batch size in each of `CURVE_POINTS` equal stretches of the run.
      environment: Where it ran.
    """

    run: plans.Run
    summary: dict[str, Any]
    examples: np.ndarray
    train_loss: np.ndarray
    test_accuracy: np.ndarray
    averaged: dict[str, tuple[np.ndarray, np.ndarray]]
    variance: np.ndarray
    sizes: list[dict[int, int]]
    step_seconds: dict[int, float]
    batch_sizes: np.ndarray
    environment: dict[str, Any]


class Results(NamedTuple):
    """A sweep as far as it went.

    Attributes:
      plan_text: The plan in TOML.
      plan: The same, parsed.
      runs: The finished runs by name.
    """

    plan_text: str
    plan: plans.Plan
    runs: dict[str, Result]

    @property
    def missing(self) -> list[plans.Run]:
        """The runs of the plan that have not finished."""
        return [run for run in self.plan.runs if run.name not in self.runs]


def merged(first: Results, *others: Results) -> Results:
    """The runs that the plan of the first asks for, whoever made them: the first, then the others.

    A run is the same where its name and its whole configuration are.
    """
    found = {
        (result.run.name, result.run.config): result
        for results in (*reversed(others), first)
        for result in results.runs.values()
    }
    runs = {
        run.name: found[run.name, run.config]._replace(run=run)
        for run in first.plan.runs
        if (run.name, run.config) in found
    }
    return first._replace(runs=runs)


def load(source: Path) -> Results:
    """Reads a sweep's folder or a compact file.

    Args:
      source: The path of either.

    Raises:
      OSError: It cannot be read.
      ValueError: It is neither, or damaged; the message names the file or the run.
    """
    return _of_folder(source) if source.is_dir() else _of_file(source)


def _of_folder(source: Path) -> Results:
    path = source / sweep.PLAN
    if not path.exists():
        raise ValueError(f"{source} holds no {sweep.PLAN}, so it is no sweep's folder.")
    with _named(f"{path} is damaged"):
        text = path.read_text("utf-8")
        plan = plans.parse(text)
    runs = {}
    for run in plan.runs:
        with _named(f"the run in {source / run.name} is damaged"):
            if sweep.is_finished(source / run.name, run.config):
                runs[run.name] = _checked(_thin(run, source / run.name))
    return Results(text, plan, runs)


def _of_file(source: Path) -> Results:
    with _named(f"{source} is no compact file of a sweep"):
        header, *rows = map(json.loads, source.read_text("utf-8").splitlines())
        text, environments = str(header["plan"]), list(header["environments"])
        plan = plans.parse(text)
        by_name = {run.name: run for run in plan.runs}
    runs = {}
    for number, row in enumerate(rows, start=2):
        with _named(f"{source} is damaged in line {number}"):
            run = by_name[row["name"]]
            runs[run.name] = _checked(_from_row(run, row, environments))
    return Results(text, plan, runs)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Raises ValueError, which begins with `what`, for all that damaged content leads to."""
    try:
        yield
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"{what}: {reason}.") from error


def _checked(result: Result) -> Result:
    """The result, if a report can be made of it.

    Raises:
      ValueError: It cannot; the message says what is wrong.
    """
    summary, evaluations = result.summary, len(result.sizes)
    losses = np.nan_to_num(result.train_loss, posinf=0.0)
    counts = [count for interval in result.sizes for pair in interval.items() for count in pair]
    checks = {
        "its evaluations have no examples, or fewer than before": evaluations > 0
        and _are(result.examples, evaluations)
        and bool(result.examples[-1] > 0 and np.all(np.diff(result.examples) >= 0)),
        "a training loss is missing or no float32 from 0 up": _are(
            losses, evaluations, LARGEST_NUMBER
        ),
        "a test accuracy is missing or not in [0, 1]": _are(
            np.nan_to_num(result.test_accuracy), evaluations, 1.0
        ),
        "averaged weights lack a loss or an accuracy of an evaluation": all(
            _are(np.nan_to_num(values, posinf=0.0), evaluations, LARGEST_NUMBER)
            for both in result.averaged.values()
            for values in both
        ),
        f"its gradient variances are not {CURVE_POINTS} numbers": _are(
            np.nan_to_num(result.variance, posinf=0.0), CURVE_POINTS
        ),
        "its steps are not counted by batch sizes": all(map(_is_count, counts)),
        "the seconds of its steps are not positive numbers": all(
            _is_count(size) and 0 < value < np.inf for size, value in result.step_seconds.items()
        ),
        f"its batch sizes are not {CURVE_POINTS} positive numbers": _are(
            result.batch_sizes, CURVE_POINTS
        )
        and bool(np.all(result.batch_sizes > 0)),
        "its summary lacks diverged, examples or steps": isinstance(summary["diverged"], bool)
        and _is_count(summary["examples"])
        and _is_count(summary["steps"]),
        "its summary holds more than numbers and words": all(
            value is None or isinstance(value, int | float | str) for value in summary.values()
        ),
        "its environment is no object": isinstance(result.environment, dict),
    }
    for problem, is_right in checks.items():
        if not is_right:
            raise ValueError(problem)
    return result


def _are(values: np.ndarray, count: int, highest: float = np.finfo(float).max) -> bool:
    """Whether these are so many numbers from 0 to the highest."""
    return values.shape == (count,) and bool(np.all((values >= 0) & (values <= highest)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def save(results: Results, path: Path) -> None:
    """Writes the compact file, whole or not at all."""
    environments: list[dict[str, Any]] = []
    rows = []
    for name, result in results.runs.items():
        if result.environment not in environments:
            environments.append(result.environment)
        config = dataclasses.asdict(result.run.config)
        rows.append(
            {
                "name": name,
                "config": {k: v for k, v in config.items() if v != _DEFAULTS[k]},
                "summary": {k: _short(v) for k, v in result.summary.items()},
                "examples": result.examples.astype(int).tolist(),
                "train_loss": [_short(x) for x in result.train_loss],
                "test_accuracy": [_short(x) for x in result.test_accuracy],
                "averaged": {
                    name: [[_short(x) for x in values] for values in both]
                    for name, both in result.averaged.items()
                },
                "variance": [_short(x) for x in result.variance],
                "sizes": [sorted(interval.items()) for interval in result.sizes],
                "step_seconds": [(k, _short(v)) for k, v in sorted(result.step_seconds.items())],
                "batch_sizes": [_short(x) for x in result.batch_sizes],
                "environment": environments.index(result.environment),
            }
        )
    header = {"plan": results.plan_text, "environments": environments}
    with run_folder.replacing(path) as partial:
        lines = (json.dumps(row, separators=(",", ":"), allow_nan=False) for row in [header, *rows])
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _thin(run: plans.Run, folder: Path) -> Result:
    record = run_folder.read(folder)
    steps, evaluations = record.metrics, record.evaluations
    size = steps["batch_size"].astype(int)
    boundaries = evaluations["step"].astype(int)
    sizes = [
        dict(zip(*(x.tolist() for x in np.unique(size[a:b], return_counts=True)), strict=True))
        for a, b in zip([0, *boundaries[:-1]], boundaries, strict=True)
    ]
    environment = json.loads((folder / sweep.ENVIRONMENT).read_text("utf-8"))
    return Result(
        run,
        record.summary,
        evaluations["examples"],
        evaluations["train_loss"],
        evaluations["test_accuracy"],
        {
            name: (evaluations[f"{name}_train_loss"], evaluations[f"{name}_test_accuracy"])
            for name in averages.NAMES
            if run.config.averages
        },
        _mean_in_stretches(steps["examples"], steps["gradient_variance"]),
        sizes,
        _step_seconds(size, steps["seconds"]),
        _mean_in_stretches(steps["examples"], size),
        environment,
    )


def _step_seconds(size: np.ndarray, seconds: np.ndarray, least: int = 4) -> dict[int, float]:
    """What a step of each size takes; the quartile leaves out compilation and other load."""
    durations = np.diff(seconds, prepend=0.0)
    return {
        int(value): float(np.quantile(durations[size == value], 0.25))
        for value in np.unique(size)
        if np.count_nonzero(size == value) >= least
    }


def _mean_in_stretches(examples: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Mean over examples of what is true of the batch that they were part of."""
    ends = np.linspace(0, examples[-1], CURVE_POINTS + 1)[1:]
    # The integral over the examples, so that a batch across two stretches counts twice.
    seen = np.concatenate([[0.0], examples])
    integral = np.concatenate([[0.0], np.cumsum(np.diff(seen) * value)])
    at_ends = np.interp(ends, seen, integral)
    means: np.ndarray = np.diff(at_ends, prepend=0.0) / (examples[-1] / CURVE_POINTS)
    return means


def _from_row(run: plans.Run, row: dict[str, Any], environments: Sequence[Any]) -> Result:
    return Result(
        run,
        row["summary"],
        np.array(row["examples"], float),
        np.array(row["train_loss"], float),
        np.array(row["test_accuracy"], float),
        {
            name: (np.array(losses, float), np.array(accuracies, float))
            for name, (losses, accuracies) in row.get("averaged", {}).items()
        },
        np.array(row.get("variance", [np.nan] * CURVE_POINTS), float),
        [dict(interval) for interval in row["sizes"]],
        dict(row["step_seconds"]),
        np.array(row["batch_sizes"], float),
        environments[row["environment"]],
    )


def _short(value: Any) -> Any:
    """Five significant digits; what is not finite becomes null."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    return float(f"{value:.5g}") if np.isfinite(value) else None
