"""Draws and judges what a sweep measured, which may be unfinished.

Writes report.md with its figures, report.html in one file, and results.jsonl, the thinned results,
which is a source too.
"""

from pathlib import Path

from experiments import report
from experiments.errors import user_errors
from experiments.escape import printable


def main(source: Path, /, *, out: Path) -> None:
    """Writes the report and prints where its files are.

    Args:
      source: The folder of a sweep, or a results.jsonl.
      out: A folder for the report.
    """
    with user_errors(ValueError, OSError):
        paths = report.write(source, out)
    for path in paths:
        print(printable(path))
