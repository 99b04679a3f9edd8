"""Runs a plan: many short runs in a few processes, each on its own cores, all of them resumable."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.escape import for_terminal
from experiments.sweeps.plan import Run
from experiments.sweeps.pool import Pool
from experiments.sweeps.worker import ENVIRONMENT as ENVIRONMENT
from experiments.training import run_folder
from experiments.training.config import RunConfig

PLAN = "sweep.toml"


class SweepError(ValueError):
    """What is in the folder cannot go on as this sweep."""


class Outcome(NamedTuple):
    """How the runs of a sweep ended.

    Attributes:
      kept: How many were there already.
      finished: How many this call made.
      diverged: How many of these diverged.
      failed: Those that failed, with their errors.
      elsewhere: Those that other processes are making, with what is known of these.
    """

    kept: int
    finished: int
    diverged: int
    failed: dict[str, str]
    elsewhere: dict[str, str]


def sweep(
    plan_text: str,
    runs: Sequence[Run],
    out: Path,
    *,
    jobs: int = 1,
    data_dir: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Makes all runs that `out` does not hold yet, each into the folder of its name.

    A run is written beside its place and moved there when it is finished, so that a kill at any
    moment leaves whole runs, which the next call keeps, and remains, which it removes. Calls at
    the same time may share `out`: each leaves to the others what they are making. Runs of one seed
    draw the same parameters and the same order of examples, whatever the method.

    Args:
      plan_text: The plan in TOML, which is kept beside the results.
      runs: Those of the plan to make, in this order.
      out: Folder of the sweep.
      jobs: Processes; the cores that this one may use are shared out among them.
      data_dir: Holds the data sets.
      console: Where progress is shown.

    Raises:
      SweepError: `out` holds a run of another configuration, or jobs is not positive.
      OSError: `out` cannot be written.
    """
    if jobs < 1:
        raise SweepError(f"jobs must be at least 1, got {jobs}.")
    console = console or Console()
    todo = [run for run in runs if not is_finished(out / run.name, run.config)]
    out.mkdir(parents=True, exist_ok=True)
    with run_folder.replacing(out / PLAN) as partial:
        partial.write_text(plan_text, encoding="utf-8")
    kept = len(runs) - len(todo)
    if kept:
        console.print(f"{kept} of {len(runs)} runs are finished already")
    diverged = 0
    failed: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    with _bars(console) as bars, Pool(out, jobs, data_dir, todo, bars) as pool:
        overall = bars.add_task("all runs", total=len(todo), note="")
        for run, how, told in pool.results(overall):
            if how == "done":
                diverged += bool(told["diverged"])
                if not console.is_terminal:
                    console.print(for_terminal(_line(run, told)), soft_wrap=True)
                continue
            (failed if how == "failed" else elsewhere)[run.name] = told
            console.print(
                for_terminal(f"{how}: {run.name}: {told.splitlines()[-1]}"), soft_wrap=True
            )
    finished = len(todo) - len(failed) - len(elsewhere)
    return Outcome(kept, finished, diverged, failed, elsewhere)


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether `folder` holds this run, whole.

    Raises:
      SweepError: It holds the run of another configuration.
    """
    if run_folder.read_summary(folder) is None:
        return False
    stored = run_folder.read_config(folder) or {}
    if unknown := stored.keys() - {field.name for field in dataclasses.fields(RunConfig)}:
        raise SweepError(f"{folder} has unknown keys: {', '.join(sorted(unknown))}.")
    try:
        run_folder.check_equal(
            f"the run in {folder}",
            dataclasses.asdict(RunConfig(**stored)),
            dataclasses.asdict(config),
        )
    except run_folder.ResumeError as error:
        raise SweepError(f"{error} Delete that folder or use another --out.") from error
    return True


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )


def _line(run: Run, summary: dict[str, Any]) -> str:
    if summary["diverged"]:
        return f"{run.name}: diverged after {summary['steps']} steps"
    if summary["without_progress"]:
        return (
            f"{run.name}: ended without progress after {summary['steps']} steps, "
            f"loss {summary['train_loss']:.4f}"
        )
    return (
        f"{run.name}: loss {summary['train_loss']:.4f}, accuracy {summary['test_accuracy']:.1%}, "
        f"{summary['steps']} steps, {summary['seconds']:.1f} s"
    )
