"""The report of a sweep: what was measured, in figures, tables and verdicts."""

from pathlib import Path

from experiments.report import results
from experiments.report.page import Page

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
    page = Page(loaded)
    markdown, html = out / "report.md", out / "report.html"
    for path, figure in page.figures.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(figure)
    markdown.write_text(page.markdown(), encoding="utf-8")
    html.write_text(page.html(), encoding="utf-8")
    return markdown, html, compact
