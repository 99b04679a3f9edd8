"""The page as text, by the templates: Markdown with its figures beside it, HTML with them inside.

Whatever a template is filled with is escaped; the templates alone write markup.
"""

import base64
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from tabulate import tabulate

from experiments.escape import for_markdown, printable


class Figure(NamedTuple):
    """A PNG, its path relative to the page, and what it shows."""

    path: str
    caption: str
    png: bytes


class Table(NamedTuple):
    """Cells as text, each row as long as the header."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Section(NamedTuple):
    """A part of the page; what it has is shown in this order.

    Attributes:
      heading: With None it goes on under that of the section before.
      lead: Bold words that the first paragraph begins with.
      paragraphs: Plain sentences.
      figures: Under each other.
      table: Or None.
      points: A list, one plain line each.
    """

    heading: str | None = None
    lead: str = ""
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    points: tuple[str, ...] = ()


def markdown(title: str, sections: list[Section]) -> str:
    """The page in Markdown, its figures by path."""
    text = _environment("github", for_markdown).get_template("report.md.jinja")
    rendered = text.render(title=title, sections=sections)
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def html(title: str, sections: list[Section]) -> str:
    """The page in HTML, as one file."""
    text = _environment("html", printable).get_template("report.html.jinja")
    return text.render(title=title, sections=sections) + "\n"


def _environment(table_format: str, escape: Any) -> jinja2.Environment:
    """Passes every text that a template shows through `escape`, and for HTML through jinja's."""

    def table(table: Table) -> Markup:
        header, *rows = ([escape(cell) for cell in row] for row in (table.header, *table.rows))
        text = tabulate(rows, header, table_format, disable_numparse=True, stralign=None)
        return Markup(text)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments.report"),
        autoescape=table_format == "html",
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["table"] = table
    environment.filters["base64"] = lambda png: Markup(base64.b64encode(png).decode())
    return environment
