"""Trains the digits with constant and adaptive batch sizes at many learning rates, and draws them.

On two problems: a net whose loss can vanish, and a model whose loss cannot, since 20 % of the
labels are wrong. All runs on a problem are one program. What they measured and a figure go under
./runs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from experiments.commands import Flag
from experiments.commands._display import refreshed
from experiments.commands.run import RUNS
from experiments.comparison import figure, outcome, problems, runs
from experiments.errors import user_errors
from experiments.escape import for_terminal
from experiments.training import run_folder

LEARNING_RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
SHOWN_RATE = 0.5
ENDS = tuple(range(1_500, 30_001, 1_500))  # numbers of examples at which losses are taken
LOG_SECONDS = 10.0
RESULTS = "results.jsonl"
PROBLEMS = (problems.clean_digits, problems.noisy_digits)


def main(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    all_methods: Flag = False,
    out: Annotated[Path | None, Parameter(show_default=False)] = None,
) -> None:
    """Trains, writes the results and prints a table.

    Args:
      seeds: of the initial parameters and of the order of the examples
      all_methods: also other constant sizes, decaying learning rates, the rules of others, momentum
        (at a tenth of the learning rates) and Adam (at a hundredth)
      out: a new or empty folder for the results (default: a new one under ./runs)
    """
    started = time.perf_counter()
    console = Console()
    methods = tuple(runs.METHODS) if all_methods else runs.MAIN
    grid = runs.Grid(methods, LEARNING_RATES, seeds)
    with user_errors(ValueError, OSError):
        if out is None:
            out = run_folder.fresh_folder(RUNS, "comparison")
        run_folder.check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{len(PROBLEMS)} problems × {len(methods)} methods × {len(LEARNING_RATES)} learning rates "
        f"× {len(seeds)} seeds, {ENDS[-1]:,} examples a run"
    )
    with watched(console, started) as reach:
        outcomes = [compared(problem(seeds), grid, reach) for problem in PROBLEMS]
    with user_errors(OSError):
        figure.plot(outcomes, SHOWN_RATE, out / run_folder.FIGURE)
        with run_folder.replacing(out / RESULTS) as partial_file:
            lines = (
                run_folder.to_json(run) for found in outcomes for run in outcome.records(found)
            )
            partial_file.write_text("".join(lines), encoding="utf-8")
    for found in outcomes:
        console.print(table(found))
    seconds = time.perf_counter() - started
    console.print(
        f"{seconds:.0f} seconds, compilation included; {time.process_time():.0f} of one core"
    )
    for name in (RESULTS, run_folder.FIGURE):
        label = "figure" if name == run_folder.FIGURE else "every run"
        console.print(for_terminal(f"{label}: {out / name}"), soft_wrap=True)


@contextmanager
def watched(console: Console, started: float) -> Iterator[Callable[[str, int], None]]:
    """Shows how far the problems are: a bar for each in a terminal, else a line now and then.

    Returns:
      A function of a problem's title and of the stretches of it that are done.
    """
    now = "setting up"
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def reach(title: str, stretches: int) -> None:
        nonlocal now
        seen = f"{ENDS[stretches - 1]:,} of {ENDS[-1]:,} examples" if stretches else "compiling"
        now = f"{title}: {seen}"
        if title not in tasks:
            tasks[title] = bars.add_task(title, total=len(ENDS))
        bars.update(tasks[title], completed=stretches)

    def log() -> None:
        console.print(for_terminal(f"{time.perf_counter() - started:.0f} s: {now}"))

    lines = nullcontext() if console.is_terminal else refreshed(log, console, LOG_SECONDS)
    with bars, lines:
        yield reach


def compared(
    problem: problems.Problem, grid: runs.Grid, reach: Callable[[str, int], None]
) -> outcome.Outcome:
    """Runs all of a problem, and tells `reach` how far they are."""

    def told() -> Iterator[runs.Stretch]:
        reach(problem.title, 0)
        for done, stretch in enumerate(runs.stretches(problem, grid, ENDS), start=1):
            reach(problem.title, done)
            yield stretch

    return outcome.collect(problem.title, grid, ENDS, problem.untrained, told())


def table(found: outcome.Outcome) -> Table:
    """One row for each method."""
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=found.title,
        title_justify="left",
        caption="Loss above the optimum, in geometric means over seeds: the lowest, and that over "
        "all α relative to the best of all methods (a loss above the untrained net's counts as "
        f"that). Steps and last batch at α = {SHOWN_RATE:g}. w̄: averaged weights.",
        caption_justify="left",
    )
    shown.add_column("method")
    for heading in ("lowest", "at α", "all α", "steps", "last batch"):
        shown.add_column(heading, justify="right")
    for (method, averaged), summary in outcome.summaries(found).items():
        sizes = found.sizes(method, SHOWN_RATE, found.grid.seeds[0])
        shown.add_row(
            f"{method}, w̄" if averaged else method,
            f"{summary.best:.4f}",
            f"{summary.best_rate:g}",
            f"{summary.excess:.1f}×",
            f"{len(sizes):,}",
            f"{sizes[-1]}",
        )
    return shown
