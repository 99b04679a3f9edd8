"""What `bench tpu` and `bench gpu` share: their options, the workers, and the outcome."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from rich.console import Console

from experiments.benchmarks import _nets, _report
from experiments.benchmarks.ahead_of_time import check, costs, programs, table, targets
from experiments.benchmarks.ahead_of_time.language_model import SIZES
from experiments.benchmarks.ahead_of_time.worker import Job
from experiments.errors import user_errors


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile, and what to do with the figures.

    Attributes:
      nets: Nets to compile; by default all, or none beside language models.
      batches: Batch sizes; by default the net's own.
      lm: Language models to compile.
      columns: What to compile.
      hottest: List so many of a program's longest kernels.
      out: Writes all numbers as JSON.
      check: File of --out; fails where a ratio is over 10 percent above its own.
      hlo: Folder to write the compiled texts to.
    """

    nets: Annotated[tuple[str, ...], _report.choice(_nets.NAMES)] = ()
    batches: tuple[int, ...] = ()
    lm: Annotated[tuple[str, ...], _report.choice(tuple(SIZES))] = ()
    columns: Annotated[tuple[str, ...], _report.choice(programs.COLUMNS)] = programs.COLUMNS
    hottest: int = 0
    out: Path | None = None
    check: Path | None = None
    hlo: Path | None = None


def bench(target: targets.Target, options: Options) -> int:
    """Compiles, prints the table, and returns the exit status.

    Returns:
      1 if a ratio rose over that of `--check`, or a program did not compile; else 0.

    Raises:
      UserError: If what compiles for the target is not installed, or a file cannot be used.
    """
    targets.check_installed(target.platform)
    with user_errors(OSError, ValueError):
        baseline = json.loads(options.check.read_text())["cells"] if options.check else None
        if options.hlo is not None:
            options.hlo.mkdir(parents=True, exist_ok=True)
    cells: list[table.Cell] = []
    failures: list[str] = []
    packages = _packages(target.platform)
    for job in jobs(target, options):
        with Console(stderr=True).status(f"{target.name} {job.net} {job.batch_size}"):
            found, failed = _run(job)
        cells += found
        failures += [f"{job.net} {job.batch_size} {failure}" for failure in failed]
        _report.write_json(
            options.out, {"versions": packages, "cells": [cell.to_json() for cell in cells]}
        )
    print(f"{target.name}, compiled, not run; {packages}\n\n{table.table(cells, target)}")
    print(f"\n{costs.MODELS[target.platform]}")
    if options.hottest:
        print(f"\n{table.hottest(cells, options.hottest)}")
    for failure in failures:
        print(f"\nnot compiled: {failure}")
    if baseline is None:
        return int(bool(failures))
    outcome = check.compare(cells, [table.Cell.from_json(cell) for cell in baseline])
    print(f"\n{outcome.text}")
    return int(bool(failures) or not outcome.passed)


def jobs(target: targets.Target, options: Options) -> Iterator[Job]:
    """One for each net and batch size."""
    small = options.nets or (() if options.lm else _nets.NAMES)
    nets = [*small, *(programs.LM_PREFIX + size for size in options.lm)]
    folder = None if options.hlo is None else str(options.hlo.resolve())
    for net in nets:
        for size in options.batches or programs.batch_sizes(net):
            yield Job(target.platform, target.name, net, size, list(options.columns), folder)


def _run(job: Job) -> tuple[list[table.Cell], list[str]]:
    """What a worker finds, and what did not compile, with the reason.

    It is a process of its own, for the compilers may abort theirs where they fail.
    """
    command = [sys.executable, "-m", "experiments.benchmarks.ahead_of_time.worker"]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command,
            input=json.dumps(job._asdict()),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=targets.environment(job.platform),
            text=True,
            check=False,
        )
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    place = {"target": job.target, "net": job.net, "batch_size": job.batch_size}
    cells = [table.Cell.from_json(place | result) for result in found if "costs" in result]
    failed = [f"{result['column']}: {result['error']}" for result in found if "error" in result]
    if done.returncode:
        ended = f"after {len(found)} programs: the worker ended with status {done.returncode}"
        failed.append(f"{ended}; {said[-1] if said else ''}")
    return cells, failed


def _packages(platform: str) -> str:
    names = {"tpu": ("jax", "jaxlib", "libtpu"), "cuda": ("jax", "jaxlib", "jax-cuda12-plugin")}
    return ", ".join(f"{name} {version(name)}" for name in names[platform])
