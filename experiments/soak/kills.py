"""Kills runs at random moments, resumes them, and compares what they wrote with a whole run."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax

from experiments.commands.run import run
from experiments.training import checkpoint, run_folder
from experiments.training.checkpoint import Schedule

TIMINGS = {"seconds", "compile_seconds", "compilations"}
PRELOADED = [run.__module__, "orbax.checkpoint", "sklearn.datasets"]
POLL_SECONDS = 0.001
LONGEST_DELAY = 8.0  # seconds, in which a run has begun
LONGEST_REFUSAL = 120.0  # seconds, in which a run that is refused has ended
BYTES_A_LINE = 190


def untimed(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What the finished run in `out` wrote, without what differs from run to run."""

    def strip(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in TIMINGS}

    written = {
        name: [strip(json.loads(line)) for line in (out / name).read_text("utf-8").splitlines()]
        for name in (run_folder.METRICS, run_folder.EVALUATIONS)
    }
    summary = json.loads((out / run_folder.SUMMARY).read_text("utf-8"))
    return {**written, run_folder.SUMMARY: [strip(summary)]}


def start(
    out: Path,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    every_steps: int | None = None,
    output: str = "",
) -> BaseProcess:
    """Starts or resumes a run in a process of its own.

    It is forked from one that has imported everything, which takes longer than a short run, but has
    not used JAX, which must not be forked.

    Args:
      out: The run's folder.
      options: Fields of `RunConfig`.
      settings: Of JAX in that process.
      every_steps: How often to write a checkpoint.
      output: The file beside `out` that takes what is printed; by default OUT.output.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = {"out": out, "resume": True, "schedule": Schedule(every_steps)}
    path = out.with_name(output) if output else _output(out)
    process = context.Process(target=_run, args=(options, arguments, settings, path))
    process.start()
    return process


def run_to_the_end(
    out: Path,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    every_steps: int | None = None,
) -> None:
    """Starts or resumes a run and waits for it.

    Raises:
      RuntimeError: It failed.
    """
    process = start(out, options, settings, every_steps)
    process.join()
    _check_status(process, out)


def run_and_kill(
    out: Path,
    options: Mapping[str, Any],
    dice: random.Random,
    settings: Mapping[str, Any],
    every_steps: int | None = None,
) -> str | None:
    """Starts or resumes the run in `out` and kills it at a random moment.

    A third of the moments follow a line of the metrics, a third the sight of a checkpoint that is
    being written, and a third lie anywhere.

    Args:
      out: The run's folder.
      options: Fields of `RunConfig`, `steps` among them.
      dice: Chooses the moment.
      settings: Of JAX in the run's process.
      every_steps: How often to write a checkpoint.

    Returns:
      What was going on, or None if the run ended before.

    Raises:
      RuntimeError: The run failed of itself.
    """
    process = start(out, options, settings, every_steps)
    try:
        _wait_for_moment(process, out, options["steps"], dice)
    finally:
        process.kill()
        process.join()
    if process.exitcode != -signal.SIGKILL:
        _check_status(process, out)
        return None
    if not _size(out / run_folder.METRICS):
        return "before the first step"
    return "during a checkpoint" if _unfinished_checkpoints(out) else "between checkpoints"


def suspend_and_requeue(
    out: Path,
    options: Mapping[str, Any],
    dice: random.Random,
    settings: Mapping[str, Any],
    every_steps: int | None = None,
) -> bool:
    """Starts or resumes the run in `out`, suspends it, and starts it again, as schedulers do.

    The second process must be refused. The first then goes on, for a moment or to its end.

    Args:
      out: The run's folder.
      options: Fields of `RunConfig`, `steps` among them.
      dice: Chooses the moment.
      settings: Of JAX in the run's processes.
      every_steps: How often to write a checkpoint.

    Returns:
      Whether the first was suspended while it held the folder.

    Raises:
      RuntimeError: Both wrote, or the first failed of itself.
    """
    first = start(out, options, settings, every_steps)
    second = None
    try:
        _wait_for_moment(first, out, options["steps"], dice)
        assert first.pid is not None
        if not first.is_alive():
            _check_status(first, out)
            return False
        os.kill(first.pid, signal.SIGSTOP)
        if not _holds(first, out):  # it had not begun, and any other may
            return False
        before = (_size(out / run_folder.METRICS), _size(out / run_folder.EVALUATIONS))
        second = start(out, options, settings, every_steps, f"{out.name}.requeued")
        second.join(LONGEST_REFUSAL)
        told = out.with_name(f"{out.name}.requeued").read_text()
        if not second.exitcode or f"held by process {first.pid} on " not in told:
            raise RuntimeError(f"two processes write {out}: {told}")
        if (_size(out / run_folder.METRICS), _size(out / run_folder.EVALUATIONS)) != before:
            raise RuntimeError(f"what a suspended process had written in {out} was changed.")
        os.kill(first.pid, signal.SIGCONT)
        if dice.random() < 0.5:
            first.join()
            _check_status(first, out)
        return True
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.join()


def _run(
    options: Mapping[str, Any],
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    output: Path,
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    for name, value in settings.items():
        jax.config.update(name, value)
    run(options, **arguments)


def _holds(process: BaseProcess, out: Path) -> bool:
    """Whether the lock of `out` names the process; one that was killed leaves its name there."""
    try:
        holder = (out / run_folder.LOCK).read_text()
    except FileNotFoundError:
        return False
    return holder.startswith(f"process {process.pid} on ")


def _check_status(process: BaseProcess, out: Path) -> None:
    if process.exitcode:
        told = _output(out).read_text()
        raise RuntimeError(f"the run failed with status {process.exitcode}: {told}")


def _output(out: Path) -> Path:
    return out.with_name(out.name + ".output")


def _wait_for_moment(process: BaseProcess, out: Path, steps: int, dice: random.Random) -> None:
    """Returns at the moment, or when the process has ended."""
    kind = dice.choice(("line", "checkpoint", "any"))
    started = time.perf_counter()
    delay = dice.uniform(0, LONGEST_DELAY if kind == "any" else 0.02)
    growth = dice.uniform(0, BYTES_A_LINE * steps)
    smallest = _size(out / run_folder.METRICS)
    in_sight, sightings = False, dice.randrange(1, 4)
    while process.is_alive():
        time.sleep(POLL_SECONDS)
        size = _size(out / run_folder.METRICS)
        smallest = min(size, smallest)  # resuming cuts what the checkpoint does not know
        before, in_sight = in_sight, _unfinished_checkpoints(out)
        sightings -= in_sight and not before
        if {
            "line": size - smallest > growth,
            "checkpoint": sightings == 0,
            "any": time.perf_counter() - started > delay,
        }[kind]:
            time.sleep(0 if kind == "any" else delay)
            return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _unfinished_checkpoints(out: Path) -> bool:
    try:
        return any("tmp" in name for name in os.listdir(out / checkpoint.FOLDER))
    except FileNotFoundError:
        return False
