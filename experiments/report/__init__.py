"""The report of the study, made in this order, each file a step.

results     reads what the runs wrote, thinned; puts together what several machines made
statistics  numbers of curves and of seeds, from arrays alone
intervals   what seeds decide: t-intervals, verdicts, how many more seeds it takes
devices     from how many devices on a method is the quickest
study       what the study's plan asks of each data set
analysis    the runs of each method on each data set, and what they measured
verdicts    the plan's questions, answered by its rules
followup    the plans that come next, by its rules
tables      of one data set
figures     likewise
page        what is told of all this, in which order
render      the page as Markdown and as HTML, by the templates
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.report import analysis, followup, page, render, results
from experiments.report.results import Results

__all__ = ["load", "next_plans", "write"]


def load(sources: Sequence[Path]) -> list[Results]:
    """Reads sweeps, each of its plans once: runs that several sources hold are put together.

    Args:
      sources: Folders of sweeps, which may be unfinished, and compact files.

    Raises:
      OSError: Something cannot be read.
      ValueError: A source is no sweep, or damaged.
    """
    loaded = [results.load(source) for source in sources]
    by_plan: dict[str, Results] = {}
    for part in loaded:
        by_plan.setdefault(part.plan_text, part)
    return [results.merged(part, *loaded) for part in by_plan.values()]


def write(parts: Sequence[Results], out: Path, clock: Sequence[Results] = ()) -> tuple[Path, Path]:
    """Writes the report.

    Args:
      parts: Sweeps of different plans: a grid, its finals, other data sets.
      out: Folder for `report.md` and its `figures/`, and `report.html`, which needs no other file.
      clock: Sweeps whose runs had the machine for themselves, by which seconds are counted.

    Returns:
      The paths of the two files.

    Raises:
      OSError: Something cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = page.sections(parts, _data_sets(parts, clock))
    for figure in (figure for section in sections for figure in section.figures):
        (out / figure.path).parent.mkdir(parents=True, exist_ok=True)
        (out / figure.path).write_bytes(figure.png)
    title = parts[0].plan.title
    markdown, html = out / "report.md", out / "report.html"
    markdown.write_text(render.markdown(title, sections), encoding="utf-8")
    html.write_text(render.html(title, sections), encoding="utf-8")
    return markdown, html


def next_plans(parts: Sequence[Results]) -> dict[str, str]:
    """The plans that follow from complete grids, in TOML, by the names of their files."""
    return followup.plans(parts, _data_sets(parts))


def _data_sets(parts: Sequence[Results], clock: Sequence[Results] = ()) -> list[analysis.DataSet]:
    timed = [result for part in clock or parts for result in part.runs.values()]
    return analysis.data_sets(parts, analysis.Clock(timed))
