"""Runs and sweeps as they would be read back, made up."""

import dataclasses
import json

import numpy as np

from experiments.report.results import CURVE_POINTS, Result, Results
from experiments.sweeps import plan, sweep
from experiments.sweeps.plan import Run
from experiments.training import run_folder

UNTRAINED = 2.3
EVALUATIONS = 9


def result(
    run: Run,
    loss: float,
    *,
    averaged: tuple[float, float] | None = None,
    accuracy: float = 0.5,
    size: int = 16,
    variance: float = float("nan"),
    step_seconds: dict[int, float] | None = None,
) -> Result:
    """A run whose loss falls exponentially to `loss`, where its last three evaluations are.

    Args:
      run: As planned.
      loss: At the end; infinite for a run that diverged.
      averaged: Those of the exponential and of the polynomial-decay average.
      accuracy: At the end, whatever the weights.
      size: Of every batch.
      variance: Of the gradient.
      step_seconds: By the size.
    """
    examples = run.config.limit[1]
    steps = examples // size // EVALUATIONS

    def curve(last: float) -> np.ndarray:
        falls = np.minimum(np.arange(EVALUATIONS + 1) / (EVALUATIONS - 2), 1.0)
        return UNTRAINED * (last / UNTRAINED) ** falls

    accuracies = np.full(EVALUATIONS + 1, np.nan)
    accuracies[-1] = accuracy
    weights = zip(("exponential", "polynomial"), averaged or (), strict=False)
    return Result(
        run=run,
        summary={
            "diverged": not np.isfinite(loss),
            "examples": examples,
            "steps": steps * EVALUATIONS,
        },
        examples=np.linspace(0, examples, EVALUATIONS + 1),
        train_loss=curve(loss) if np.isfinite(loss) else np.r_[UNTRAINED, [np.nan] * EVALUATIONS],
        test_accuracy=accuracies,
        averaged={name: (curve(last), accuracies) for name, last in weights},
        variance=np.full(CURVE_POINTS, variance),
        sizes=[{}, *[{size: steps}] * EVALUATIONS],
        step_seconds={size: 0.001 * size} if step_seconds is None else step_seconds,
        batch_sizes=np.full(CURVE_POINTS, float(size)),
        environment={},
    )


def measured(text: str, measure) -> Results:
    """A sweep whose runs measured what `measure` of each says: `result`'s arguments, or None."""
    parsed = plan.parse(text)
    told = {run.name: (run, measure(run)) for run in parsed.runs}
    runs = {name: result(run, **kwargs) for name, (run, kwargs) in told.items() if kwargs}
    return Results(text, parsed, runs)


def finished(title="Sweep", note="A note.", dataset="Data", name="CABS", environment="Linux"):
    """A finished sweep of one seed, with these names."""
    title, note, dataset, name = (
        json.dumps(text, ensure_ascii=False) for text in (title, note, dataset, name)
    )
    text = f"""
        title = {title}
        notes = [{note}]
        learning_rates = [0.1, 0.2, 0.4]
        examples = 1440
        [datasets.digits]
        title = {dataset}
        [methods.cabs]
        title = {name}
        [methods.constant]
        title = {name}
        """
    made = measured(text, lambda run: {"loss": 0.5, "averaged": (0.4, 0.5), "variance": 1.0})
    told = {"system": environment, environment: 1}
    return made._replace(runs={k: r._replace(environment=told) for k, r in made.runs.items()})


def whole_folder(root):
    """Makes the folder of a sweep of one run, all finished, and returns that of the run."""
    text = "learning_rates = [0.1]\nexamples = 64\n[datasets.digits]\n[methods.cabs]\n"
    (run,) = plan.parse(text).runs
    folder = root / run.name
    folder.mkdir(parents=True)
    (root / sweep.PLAN).write_text(text)
    run_folder.write_json(folder / run_folder.CONFIG, dataclasses.asdict(run.config))
    summary = dict.fromkeys(run_folder.SUMMARY_KEYS, 1.0)
    summary |= {"diverged": False, "examples": 64, "steps": 2}
    run_folder.write_json(folder / run_folder.SUMMARY, summary)
    run_folder.write_json(folder / sweep.ENVIRONMENT, {"system": "Linux"})
    steps = [
        {
            "step": i,
            "batch_size": 32,
            "gradient_variance": 2.0,
            "examples": 32 * i,
            "seconds": i,
        }
        for i in (1, 2)
    ]
    evaluations = [
        {"step": i, "examples": 32 * i, "train_loss": 1.0, "test_accuracy": 0.5} for i in (0, 2)
    ]
    for name, rows in ((run_folder.METRICS, steps), (run_folder.EVALUATIONS, evaluations)):
        (folder / name).write_text("".join(map(run_folder.to_json, rows)))
    return folder
