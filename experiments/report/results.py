"""The runs of a sweep, thinned: read from its folder or from one compact file, and written there.

The compact file has one JSON object a line: first the plan, then one for each finished run.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.sweeps import plan as plans
from experiments.sweeps import sweep
from experiments.training import run_folder as records
from experiments.training.config import RunConfig

FILE = "results.jsonl"
CURVE_POINTS = 40
_DEFAULTS = dataclasses.asdict(RunConfig())


class Result(NamedTuple):
    """One finished run.

    Attributes:
        run: What was run.
        summary: As the run wrote it.
        examples: Examples seen at each evaluation, (e,).
        train_loss: On a fixed part of the training examples, (e,); NaN once diverged.
        test_accuracy: Likewise, of the test examples.
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
    sizes: list[dict[int, int]]
    step_seconds: dict[int, float]
    batch_sizes: np.ndarray
    environment: dict[str, Any]

    @property
    def final_loss(self) -> float:
        """The training loss at the end; infinite where the run diverged."""
        last = float(self.train_loss[-1])
        return last if not self.summary["diverged"] and np.isfinite(last) else float("inf")


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


def load(source: Path) -> Results:
    """Reads a sweep's folder or a compact file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is neither, or damaged.
    """
    if source.is_dir():
        path = source / sweep.PLAN
        if not path.exists():
            raise ValueError(f"{source} holds no {sweep.PLAN}, so it is no sweep's folder")
        text = path.read_text("utf-8")
        plan = plans.parse(text)
        finished = (r for r in plan.runs if sweep.is_finished(source / r.name, r.config))
        return Results(text, plan, {run.name: _thin(run, source / run.name) for run in finished})
    try:
        header, *rows = map(json.loads, source.read_text("utf-8").splitlines())
        plan = plans.parse(str(header["plan"]))
        by_name = {run.name: run for run in plan.runs}
        environments = header["environments"]
        runs = {row["name"]: _from_row(by_name[row["name"]], row, environments) for row in rows}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is no compact file of a sweep: {error!r}") from error
    return Results(header["plan"], plan, runs)


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
                "sizes": [sorted(interval.items()) for interval in result.sizes],
                "step_seconds": [(k, _short(v)) for k, v in sorted(result.step_seconds.items())],
                "batch_sizes": [_short(x) for x in result.batch_sizes],
                "environment": environments.index(result.environment),
            }
        )
    header = {"plan": results.plan_text, "environments": environments}
    with records.replacing(path) as partial:
        lines = (json.dumps(row, separators=(",", ":"), allow_nan=False) for row in [header, *rows])
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _thin(run: plans.Run, folder: Path) -> Result:
    record = records.read(folder)
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


def _mean_in_stretches(examples: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Mean over examples of the batch size that they were part of."""
    ends = np.linspace(0, examples[-1], CURVE_POINTS + 1)[1:]
    # The integral of the size over the examples, so that a batch across two stretches counts twice.
    seen = np.concatenate([[0.0], examples])
    integral = np.concatenate([[0.0], np.cumsum(np.diff(seen) * size)])
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
        [dict(_pairs(interval)) for interval in row["sizes"]],
        dict(_pairs(row["step_seconds"])),
        np.array(row["batch_sizes"], float),
        environments[row["environment"]],
    )


def _pairs(rows: Iterable[Sequence[Any]]) -> Iterable[tuple[Any, Any]]:
    return ((key, value) for key, value in rows)


def _short(value: Any) -> Any:
    """Five significant digits; what is not finite becomes null."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    return float(f"{value:.5g}") if np.isfinite(value) else None
