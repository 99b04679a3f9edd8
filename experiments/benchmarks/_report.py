"""What a benchmark writes: a Markdown table, and all its numbers as JSON."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from cyclopts import Parameter
from tabulate import tabulate

from experiments import environment
from experiments.commands import Flag
from experiments.training.run_folder import replacing


def machine(*packages: str) -> str:
    """Names the processor, the cores in use and the versions of packages."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{environment.processor()}, {len(environment.cores())} cores, {versions}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right.

    >>> print(markdown(["net", "time"], [["mlp", "1.0"]]))
    | net   |   time |
    |:------|-------:|
    | mlp   |    1.0 |
    """
    align = ("left", *["right"] * (len(header) - 1))
    return str(tabulate(rows, header, "pipe", colalign=align, disable_numparse=True))


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, to three digits.

    >>> milliseconds(0.25123), milliseconds(0.0012345)
    ('251 ms', '1.23 ms')
    """
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} ms"


@dataclasses.dataclass(frozen=True)
class Options:
    """What benchmarks of nets share.

    Attributes:
      batches: Batch sizes (default: the net's own).
      repeats: Pairs of each cell, at most.
      seconds: Spent on each cell, about.
      memory: What a program may need to be run, in GiB.
      quick: Few repeats.
      out: Writes all numbers as JSON.
    """

    batches: tuple[int, ...] = ()
    repeats: int = 25
    seconds: float = 3.0
    memory: float = 4.0
    quick: Flag = False
    out: Path | None = None

    def resolved(self) -> Self:
        """With few repeats, if it is to be quick."""
        if not self.quick:
            return self
        return dataclasses.replace(self, repeats=min(self.repeats, 3), seconds=0.2)


def choice(known: Iterable[str]) -> Parameter:
    """Lets only these names pass."""

    def check(type_: Any, names: Sequence[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"choose from {', '.join(known)}.")

    return Parameter(validator=check)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes all numbers, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")
