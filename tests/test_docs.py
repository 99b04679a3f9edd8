"""What README, the READMEs of experiments and the site say is run, and checked against the code."""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import cabs_jax
from experiments import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / ".github" / "docs"
PAGES = [
    ROOT / "README.md",
    *(ROOT / "experiments" / name / "README.md" for name in (".", "benchmarks", "results")),
    *sorted(DOCS.rglob("*.md")),
]


def page_id(page):
    return page.resolve().relative_to(ROOT).as_posix()


def check_printed(example: Example):
    """A text block after a Python block is what the page has printed since the last one."""
    printed = example.document.namespace.get("printed")
    if printed is not None and printed.getvalue():
        assert printed.getvalue() == example.parsed
        printed.seek(0)
        printed.truncate()


def run(example: Example):
    """Runs a Python block, all of a page in one namespace, and keeps what it prints."""
    printed = example.document.namespace.setdefault("printed", io.StringIO())
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)


def run_page(page) -> str:
    """Runs a page, and returns what no text block of it has taken."""
    parsers = [CodeBlockParser("python", run), CodeBlockParser("text", check_printed)]
    document = Sybil(parsers=parsers, path=str(page.parent)).parse(page)
    for example in document.examples():
        example.evaluate()
    return document.namespace["printed"].getvalue() if "printed" in document.namespace else ""


SLOW = {
    DOCS / name
    for name in ("method.md", "tutorial.md", "how-to/changing-sizes.md", "how-to/pod.md")
}


@pytest.mark.every_case
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES[1:]],
    ids=page_id,
)
def test_code_runs_and_prints_what_the_page_says(page):
    run_page(page)


@pytest.mark.slow  # trains a net
def test_the_batch_size_of_the_readme_adapts_as_its_table_says():
    sizes = [int(size) for size in re.findall(r"next batch (\d+)", run_page(PAGES[0]))]
    assert len(sizes) == 9
    assert sizes[:3] == [16, 16, 16]
    assert min(sizes[-4:]) >= 48


def commands():
    """Every command of a shell block, once."""
    found: dict[str, None] = {}
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            found[line.strip()] = None
    return [command for command in found if command]


@pytest.mark.parametrize("command", commands())
def test_commands_and_their_options_exist(command, capsys):
    _, started, arguments = command.partition("-m experiments")
    if not started:
        assert re.search(r"pip install|python -m pytest|^gcloud|mkdocs build|\.ci/run", command)
        return
    words = shlex.split(re.sub(r"['&]+\s*$", "", arguments))
    names = [word for word in words if not word.startswith("--")]
    options = [word for word in words if word.startswith("--")]
    subcommand = names[: 2 if names[:1] == ["bench"] else 1]
    with contextlib.suppress(SystemExit):
        cli.main([*subcommand, "--help"])
    shown = capsys.readouterr().out
    assert shown, subcommand
    assert [option for option in options if option not in shown] == []
    assert [n for n in names if n.startswith("experiments/") and not (ROOT / n).exists()] == []


def messages(folder):
    """Every string in the code, `…` standing for what is formatted into it."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                yield "".join(parts)


def test_troubleshooting_quotes_messages_that_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    known = list(messages(ROOT / "cabs_jax"))
    assert len(quoted) > 15
    assert [text for text in quoted if not any(text in message for message in known)] == []


def test_every_public_name_has_one_place_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    rules = [name for name, rule in vars(cabs_jax.rules).items() if is_rule_factory(rule)]
    public = [f"cabs_jax.{name}" for name in cabs_jax.__all__ if name[0] != "_"]
    assert sorted(listed) == sorted(public + [f"cabs_jax.rules.{name}" for name in rules])


def is_rule_factory(value):
    return getattr(value, "__annotations__", {}).get("return") == "Rule"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES[1:4]], ids=page_id)
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and "actions/workflows" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
