"""Names and paths of any origin, shown letter by letter: no markup in them takes effect.

HTML is left to jinja2's autoescape.
"""

import functools
import re

from rich.text import Text

_MARKDOWN = re.compile(r"(?=[\\`*_\[\]<>&|~$])|^(?=[#+-]+(?: |$))|(?<=^\d)(?=[.)](?: |$))")


def printable(text: object) -> str:
    r"""`text` on one line: blanks become one space, and what has no letter form an escape.

    >>> printable("a\n\tb\x1b[31m\x00")
    'a b\\x1b[31m\\x00'
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def for_terminal(text: object) -> Text:
    """What rich prints as it is, without reading `[…]` as markup.

    >>> for_terminal("runs/[/x]").plain
    'runs/[/x]'
    """
    return Text(printable(text))


def for_figure(text: object, longest: int = 40) -> str:
    r"""What matplotlib draws as it is: no mathematics between dollars, no letter its font lacks.

    Args:
      text: The name.
      longest: How many letters to show at most; what is longer ends in "…".

    >>> for_figure("$x^$")
    '\\$x^\\$'
    """
    letters = _letters_of_the_font()
    name = "".join(c if ord(c) in letters else "\N{REPLACEMENT CHARACTER}" for c in printable(text))
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    # Legends leave out labels that are empty or begin with an underscore.
    prefix = "\N{HAIR SPACE}" if name[:1] in ("", "_") else ""
    return prefix + name.replace("$", r"\$")


def for_markdown(text: object) -> str:
    r"""What Markdown renders as it is, in a sentence, a heading or a cell of a table.

    >>> for_markdown("<b> [x](y) | `z`")
    '\\<b\\> \\[x\\](y) \\| \\`z\\`'
    """
    return _MARKDOWN.sub(r"\\", printable(text))


@functools.cache
def _letters_of_the_font() -> frozenset[int]:
    from matplotlib import font_manager  # takes half a second, which an error need not

    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())
