"""Puts the READMEs and reports under experiments/, with their figures, on the site as they are."""

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
    """Turns links that hold in the repository, where pages lie in .github/docs, into the site's."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith("experiments/"):
        return markdown.replace(f"]({up}.github/docs/", f"]({up}")
    return markdown.replace(f"]({up}../../experiments/", f"]({up}experiments/")
