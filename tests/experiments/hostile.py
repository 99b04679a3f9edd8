"""Names that do harm where they are taken for markup, a format or mathematics."""

NAMES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><h1>x",
    "&lt;b&gt;",
    "{{ 7 * 7 }}{% for %}",
    "[/x]",
    "[red]x[/red]\\",
    "[link](javascript:alert(1)) ![i](x)",
    "`a` **b** __c__ ~~d~~ | e",
    "# x",
    "1. x",
    "- x",
    "$x^$",
    r"\$x^$ $\frac$",
    "_hidden",
    "%s %(x)d {0} {x!r}",
    "a\nb\r\n\nc\x0b\x85\u2028d",
    "\x00\x07\x1b[31m",
    "\u202eabc\ufeff",
    "数据 🙂",
    "x" * 300,
    "-",
    " ",
    "",
)
# Names that a folder cannot have, or that would lead out of it.
FILE_NAMES = tuple(
    name for name in NAMES if name.strip() and not set("/\0") & set(name) and len(name) < 256
)
