"""The report of a sweep, made in this order, each file a step.

results     reads what the runs wrote, thinned
statistics  numbers of curves and of seeds, from arrays alone
intervals   what seeds decide: t-intervals, verdicts, how many more seeds it takes
devices     from how many devices on a method is the quickest
analysis    those numbers for each method and data set
verdicts    the paper's claims, judged by them
figures     drawn from them
page        what is told of all this, in which order
render      the page as Markdown and as HTML, by the templates
"""

from pathlib import Path

from experiments.report import page, render, results

__all__ = ["write"]


def write(source: Path, out: Path) -> tuple[Path, ...]:
    """Writes the report on a sweep, which may be unfinished.

    Args:
      source: The folder of a sweep, or the compact file that an earlier report wrote.
      out: Folder for `report.md` and its `figures/`, `report.html`, which needs no other file,
        and `results.jsonl`, from which all of these can be made again.

    Returns:
      The paths of the three files.

    Raises:
      OSError: Something cannot be read or written.
      ValueError: `source` is no sweep, or damaged.
    """
    loaded = results.load(source)
    out.mkdir(parents=True, exist_ok=True)
    compact = out / results.FILE
    results.save(loaded, compact)
    title, sections = loaded.plan.title, page.sections(loaded)
    for figure in (figure for section in sections for figure in section.figures):
        (out / figure.path).parent.mkdir(parents=True, exist_ok=True)
        (out / figure.path).write_bytes(figure.png)
    markdown, html = out / "report.md", out / "report.html"
    markdown.write_text(render.markdown(title, sections), encoding="utf-8")
    html.write_text(render.html(title, sections), encoding="utf-8")
    return markdown, html, compact
