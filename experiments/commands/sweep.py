"""The commands `sweep` and `report`."""

import argparse
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.commands.errors import user_errors
from experiments.sweeps import plan, sweep


def add_parsers(commands: Any) -> None:
    """Adds both to the subcommands of a parser."""
    sweep_parser = commands.add_parser(
        "sweep",
        help="make many runs",
        description="Makes every run that a plan in TOML asks for and the folder does not hold "
        "yet. Killed at any moment and called again, it goes on. The exit status is 1 if a run "
        "failed; the others are made nevertheless. experiments/sweeps/plan.py describes the plan.",
        allow_abbrev=False,
    )
    sweep_parser.set_defaults(command=run_sweep)
    sweep_parser.add_argument("plan", type=Path, metavar="PLAN.toml", help="what to run")
    sweep_parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="holds the runs"
    )
    sweep_parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes, among which the cores are shared out (default 1)",
    )
    sweep_parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="make only part I, from 1, of N, as one machine of N that share DIR or not",
    )
    sweep_parser.add_argument(
        "--datasets",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="make only the runs on these data sets of the plan, such as svhn,cifar100",
    )
    sweep_parser.add_argument(
        "--data-dir", metavar="DIR", help="holds the data sets (default $CABS_JAX_DATA)"
    )

    report_parser = commands.add_parser(
        "report",
        help="draw and judge what a sweep measured",
        description="Writes report.md with its figures, report.html in one file, and "
        "results.jsonl, the thinned results, which is a source too. The sweep may be unfinished.",
        allow_abbrev=False,
    )
    report_parser.set_defaults(command=run_report)
    report_parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="the folder of a sweep, or a results.jsonl"
    )
    report_parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for the report"
    )


def run_sweep(options: dict[str, Any]) -> int:
    """Makes the runs of a plan; 1 if any failed."""
    console = Console()
    with user_errors(ValueError, OSError):
        text = options["plan"].read_text("utf-8")
        runs = plan.on_datasets(plan.parse(text), options["datasets"])
        runs = plan.shard(runs, *options["shard"])
        outcome = sweep.sweep(
            text,
            runs,
            options["out"],
            jobs=options["jobs"],
            data_dir=options["data_dir"],
            console=console,
        )
    console.print(
        f"{outcome.finished} runs finished, {outcome.diverged} of which diverged; "
        f"{outcome.kept} were there already; {len(outcome.failed)} failed"
    )
    for name in outcome.failed:
        console.print(f"  {name}: see {options['out'] / name}{sweep.ERROR}", soft_wrap=True)
    return 1 if outcome.failed else 0


def run_report(options: dict[str, Any]) -> None:
    """Writes the report on a sweep."""
    from experiments import report

    with user_errors(ValueError, OSError):
        paths = report.write(options["source"], options["out"])
    for path in paths:
        print(path)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"give I/N, such as 1/4, not {text!r}")
    return int(match[1]), int(match[2])
