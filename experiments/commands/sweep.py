"""Makes every run that a plan in TOML asks for and the folder does not hold yet.

Killed at any moment and called again, it goes on. The exit status is 1 if a run failed; the others
are made nevertheless. experiments/sweeps/plan.py describes the plan.
"""

import re
from pathlib import Path

from rich.console import Console

from experiments.errors import UserError, user_errors
from experiments.escape import for_terminal
from experiments.report import results
from experiments.sweeps import plan as plans
from experiments.sweeps.sweep import sweep
from experiments.sweeps.worker import ERROR


def main(
    plan: Path,
    /,
    *,
    out: Path,
    jobs: int = 1,
    shard: str = "1/1",
    datasets: str | None = None,
    known: tuple[Path, ...] = (),
    data_dir: str | None = None,
) -> int:
    """Makes the runs; returns 1 if any failed.

    Args:
      plan: What to run, in TOML.
      out: The folder of the runs.
      jobs: Processes, among which the cores are shared out.
      shard: Make only part I, from 1, of N, as one machine of N that share the folder or not.
      datasets: Make only the runs on these data sets of the plan, such as svhn,cifar100.
      known: Sweeps' folders or results.jsonl; runs that they hold are not made again.
      data_dir: The folder of the data sets (default $CABS_JAX_DATA).
    """
    console = Console()
    part = re.fullmatch(r"(\d+)/(\d+)", shard)
    if part is None:
        raise UserError(f"--shard: give I/N, such as 1/4, not {shard!r}.")
    with user_errors(ValueError, OSError):
        text = plan.read_text("utf-8")
        planned = plans.parse(text)
        runs = plans.on_datasets(planned, datasets and datasets.split(","))
        runs = plans.shard(runs, int(part[1]), int(part[2]))
        nothing = results.Results(text, planned, {})
        made = results.merged(nothing, *map(results.load, known)).runs
        todo = [run for run in runs if run.name not in made]
        outcome = sweep(text, todo, out, jobs=jobs, data_dir=data_dir, console=console)
    console.print(
        f"{outcome.finished} runs finished, {outcome.diverged} of which diverged; "
        f"{outcome.kept + len(runs) - len(todo)} were there already; "
        f"{len(outcome.elsewhere)} are left to other processes; {len(outcome.failed)} failed"
    )
    for name in outcome.failed:
        console.print(for_terminal(f"  {name}: see {out / name}{ERROR}"), soft_wrap=True)
    return 1 if outcome.failed else 0
