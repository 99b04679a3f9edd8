"""Runs and sweeps as they would be read back, made up."""

import dataclasses
import itertools
import json

import numpy as np

from experiments.report import analysis
from experiments.report.results import Result, Results
from experiments.sweeps import plan, sweep
from experiments.sweeps.plan import Run
from experiments.training import run_folder
from experiments.training.config import RunConfig


def method(name, losses, sizes=16, accuracy=0.9, spread=(1.0,), **config):
    """A method with a run for each rate and seed: its loss falls exponentially to the end."""
    runs = []
    for (rate, median), (seed, factor) in itertools.product(losses.items(), enumerate(spread)):
        loss = median * factor
        cfg = RunConfig(method=name, learning_rate=rate, examples=1600, seed=seed, **config)
        runs.append(
            Result(
                run=Run("data", name, rate, cfg),
                summary={"diverged": not np.isfinite(loss), "examples": 1600, "steps": 100},
                examples=np.array([0.0, 800.0, 1600.0]),
                train_loss=np.array([1.0, loss**0.5, loss]),
                test_accuracy=np.array([0.1, 0.5, accuracy]),
                averaged={},
                variance=np.full(40, np.nan),
                sizes=[{}, {sizes: 800 // sizes}, {sizes: 800 // sizes}],
                step_seconds={sizes: 0.001 * sizes},
                batch_sizes=np.full(40, sizes),
                environment={},
            )
        )
    return analysis.Method(name, f"{name} {sizes}", runs, analysis.Costs(runs))


def finished(title="Sweep", note="A note.", dataset="Data", name="CABS", environment="Linux"):
    """A finished sweep of one seed, with these names."""
    title, note, dataset, name = (
        json.dumps(text, ensure_ascii=False) for text in (title, note, dataset, name)
    )
    text = f"""
        title = {title}
        notes = [{note}]
        learning_rates = [0.1, 0.2, 0.4]
        examples = 1600
        [datasets.digits]
        title = {dataset}
        [methods.cabs]
        title = {name}
        [methods.constant]
        title = {name}
        """
    parsed = plan.parse(text)
    (run,) = method("cabs", {0.1: 0.5}, 32).by_rate[0.1]
    run = run._replace(environment={"system": environment, environment: 1})
    return Results(text, parsed, {p.name: run._replace(run=p) for p in parsed.runs})


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
