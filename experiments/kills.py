"""Kills runs at random moments, resumes them, and compares what they wrote with a whole run."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import checkpoint, records

TIMINGS = {"seconds", "compile_seconds", "compilations"}
RUN = (sys.executable, "-m", "experiments", "run")
POLL_SECONDS = 0.001
LONGEST_DELAY = 12.0  # seconds, in which a run has begun
BYTES_A_LINE = 190


def untimed(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What the finished run in `out` wrote, without what differs from run to run."""

    def strip(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in TIMINGS}

    written = {
        name: [strip(json.loads(line)) for line in (out / name).read_text("utf-8").splitlines()]
        for name in (records.METRICS, records.EVALUATIONS)
    }
    summary = json.loads((out / records.SUMMARY).read_text("utf-8"))
    return {**written, records.SUMMARY: [strip(summary)]}


def run_to_the_end(out: Path, options: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs `experiments run --out OUT` in a process of its own.

    Raises:
        subprocess.CalledProcessError: It failed; its output is in the error.
    """
    subprocess.run(
        [*RUN, "--out", str(out), *options],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )


def run_and_kill(
    out: Path,
    options: Sequence[str],
    steps: int,
    dice: random.Random,
    environment: Mapping[str, str],
) -> str | None:
    """Starts or resumes the run in `out` and kills it at a random moment.

    A third of the moments follow a line of the metrics by up to a few steps, a third the first
    sight of a checkpoint that is being written, and a third lie anywhere.

    Args:
        out: The run's folder.
        options: Of `experiments run`.
        steps: How many the run has.
        dice: Chooses the moment.
        environment: Added to that of this process.

    Returns:
        What was going on, or None if the run ended before.

    Raises:
        RuntimeError: The run failed of itself.
    """
    process = subprocess.Popen(
        [*RUN, "--out", str(out), "--resume", *options],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _wait_for_moment(process, out, steps, dice)
    finally:
        process.kill()
        _, told = process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode != -9:
        raise RuntimeError(f"the run failed with status {process.returncode}: {told.decode()}")
    if not _size(out / records.METRICS):
        return "before the first step"
    return "during a checkpoint" if _unfinished_checkpoints(out) else "between checkpoints"


def _wait_for_moment(
    process: subprocess.Popen[bytes], out: Path, steps: int, dice: random.Random
) -> None:
    """Returns at the moment, or when the process has ended."""
    kind = dice.choice(("line", "checkpoint", "any"))
    started = time.perf_counter()
    delay = dice.uniform(0, LONGEST_DELAY if kind == "any" else 0.02)
    growth = dice.uniform(0, BYTES_A_LINE * steps)
    smallest = _size(out / records.METRICS)
    in_sight, sightings = False, dice.randrange(1, 4)
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        size = _size(out / records.METRICS)
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
