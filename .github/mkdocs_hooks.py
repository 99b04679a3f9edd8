"""Puts the READMEs and reports under experiments/, with their figures, on the site as they are."""

import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SUFFIXES = {".md", ".png"}
LINKED = (
    "experiments/configs/*.toml",
    "experiments/examples/*.py",
    "experiments/comparison/runs.py",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them under their paths in the repository."""
    for source in sorted((ROOT / "experiments").rglob("*")):
        if source.suffix in SUFFIXES or any(source.match(pattern) for pattern in LINKED):
            path = source.relative_to(ROOT).as_posix()
            files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that hold in the repository, where pages lie in .github/docs, into the site's.

    The diff of a program becomes three tabs: what changes, and each of the two, to be copied.
    """
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"^```diff\n(.*?)^```\n", _tabs, markdown, flags=re.DOTALL | re.MULTILINE)
    if page.file.src_uri.startswith("experiments/"):
        return markdown.replace(f"]({up}.github/docs/", f"]({up}")
    return markdown.replace(f"]({up}../../experiments/", f"]({up}experiments/")


def _tabs(diff: re.Match[str]) -> str:
    lines = diff[1].splitlines()
    before, after = (
        "\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) for sign in "-+"
    )
    tabs = {"Changes": ("diff", diff[1].rstrip()), "Before": ("python", before)}
    tabs["After"] = "python", after
    return "\n".join(
        f'=== "{title}"\n\n' + textwrap.indent(f"```{language}\n{code}\n```\n", "    ")
        for title, (language, code) in tabs.items()
    )
