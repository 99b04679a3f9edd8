"""Draws and judges what sweeps measured, which may be unfinished.

Several sources are one study: the grid first, then finals and whatever else belongs to it. Sources
of the same plan, such as a folder and the compact file of another machine, are put together.
"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments import report
from experiments.errors import UserError, user_errors
from experiments.escape import printable
from experiments.report import results


def main(
    *sources: Path,
    out: Path | None = None,
    compact: Path | None = None,
    next_plans: Annotated[Path | None, Parameter(name="--next")] = None,
    clock: tuple[Path, ...] = (),
) -> None:
    """Writes what is asked for and prints where it is.

    Args:
      sources: Folders of sweeps, or results.jsonl files.
      out: A folder for report.md with its figures, and report.html in one file.
      compact: A file for the runs of the first source's plan, thinned: a source, too.
      next_plans: A folder for the plans that follow from complete grids by the study's rules.
      clock: Sweeps of configs/clock.toml, made alone: by these, seconds are counted.
    """
    if not sources or (out, compact, next_plans) == (None, None, None):
        raise UserError("report: give a sweep, and --out, --compact or --next.")
    paths: list[Path] = []
    with user_errors(ValueError, OSError):
        parts = report.load(sources)
        if compact is not None:
            compact.parent.mkdir(parents=True, exist_ok=True)
            results.save(parts[0], compact)
            paths.append(compact)
        if next_plans is not None:
            next_plans.mkdir(parents=True, exist_ok=True)
            for name, text in report.next_plans(parts).items():
                (next_plans / name).write_text(text, encoding="utf-8")
                paths.append(next_plans / name)
        if out is not None:
            paths += report.write(parts, out, report.load(clock))
    for path in paths:
        print(printable(path))
    if next_plans is not None and not any(path.parent == next_plans for path in paths):
        print("no plan follows: a grid is unfinished, or all that follows is there")
