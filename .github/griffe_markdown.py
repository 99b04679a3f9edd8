"""Turns the Markdown of docstrings into that of the site, which knows no doctests."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)
BULLET = re.compile(r" *\* \S")


class Markdown(griffe.Extension):
    """Fences doctests, indents what hangs below a bullet, names a single example as a section."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of whatever was read."""
        if obj.docstring:
            text = DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", indented(obj.docstring.value))
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def indented(text: str) -> str:
    """Indents the lines of list items by four spaces instead of two, and parts the items."""
    lines: list[str] = []
    column = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if BULLET.match(line):
            lines += [""] if lines and lines[-1] else []
            column = indent
        elif column is not None and line.strip():
            column = column if indent > column else None
            line = line if column is None else f"  {line}"
        lines.append(line)
    return "\n".join(lines)
