"""Whether any program became dearer, against figures that were written before."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.benchmarks.ahead_of_time.table import Cell, ratios

TOLERANCE = 0.10
CHECKED = {"seconds": "time", "memory_bytes": "memory", "temporary_bytes": "temporary memory"}


class Outcome(NamedTuple):
    """Whether all is as it was, and the lines that say so."""

    passed: bool
    text: str


def compare(cells: Sequence[Cell], baseline: Sequence[Cell]) -> Outcome:
    """Compares the multiples of the plain step with those of a baseline.

    A program that the baseline lacks is named and passes; one that only the baseline has was not
    asked for. With no program in common nothing is checked, which fails.
    """
    now, before = ratios(cells), ratios(baseline)
    common = [place for place in now if place in before]
    if not common:
        return Outcome(False, "check: the file holds none of these programs.")
    risen = [
        f"{' '.join(map(str, place))}: {label} {before[place][name]:.2f}× → {now[place][name]:.2f}×"
        for place in common
        for name, label in CHECKED.items()
        if now[place][name] > before[place][name] * (1 + TOLERANCE)
    ]
    new = [" ".join(map(str, place)) for place in now if place not in before]
    lines = [f"check: {len(common)} programs, {len(risen)} ratios rose by more than 10 %."]
    lines += [f"  {line}" for line in risen]
    lines += [f"  not in the file: {name}" for name in new]
    return Outcome(not risen, "\n".join(lines))
