"""What a benchmark writes: a Markdown table, and all its numbers as JSON."""

import argparse
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> str:
    """Names the processor, the cores in use and the versions of packages."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{processor}, {cores} cores, {versions}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right.

    >>> print(markdown(["net", "time"], [["mlp", "1.0"]]))
    | net | time |
    |:----|-----:|
    | mlp |  1.0 |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), "|" + "|".join(rule) + "|", *map(line, rows)])


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, to three digits.

    >>> milliseconds(0.25123), milliseconds(0.0012345)
    ('251 ms', '1.23 ms')
    """
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} ms"


def add_options(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    """Adds the options that benchmarks of nets share."""
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="NET")
    parser.add_argument(
        "--batches", nargs="+", type=int, metavar="M", help="batch sizes (default: the net's own)"
    )
    parser.add_argument("--repeats", type=int, default=25, help="pairs of each cell, at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each cell, about")
    parser.add_argument(
        "--memory", type=float, default=4, metavar="GIB", help="what a program may need to be run"
    )
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--out", type=Path, metavar="FILE", help="writes all numbers as JSON")


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes all numbers, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
