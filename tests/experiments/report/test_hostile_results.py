"""Reports of what may come from anyone: names that are markup, files that are damaged."""

import html.parser
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from experiments import escape
from experiments.report import analysis, figures, page, render, results
from experiments.sweeps import sweep
from experiments.training import run_folder
from tests.experiments import hostile
from tests.experiments.measured import finished, whole_folder


class Tags(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", hostile.NAMES)
def test_names_reach_both_pages_letter_by_letter(name):
    in_markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    pages = []
    for shown in ("plain", name):
        html_page, markdown = page_without_figures(shown, finished(*[shown] * 5))
        pages.append((Tags(html_page), Tags(in_markdown.render(markdown))))
    for plain, harmful in zip(*pages, strict=True):
        assert harmful.found == plain.found
        letters = "".join("".join(harmful.text).split())
        assert letters.count("".join(escape.printable(name).split())) >= 6


@pytest.mark.slow  # draws six figures
@pytest.mark.parametrize(
    "name", ["$x^$", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("", "_hidden"))]
)
def test_names_are_drawn_in_the_figures_of_a_report(name):
    (data,) = analysis.data_sets([finished(dataset=name, name=name)], analysis.Clock([]))
    assert figures.curves(data).startswith(b"\x89PNG")
    assert figures.sensitivity(data).startswith(b"\x89PNG")
    assert figures.floors(data).startswith(b"\x89PNG")


DAMAGES = (
    None,
    "",
    "x\x00",
    -1,
    0,
    0.5,
    1e400,
    float("nan"),
    10**400,
    True,
    [],
    [None],
    [[]],
    [[[16, 1]]],
    {},
    {"a": {}},
)


def told_or_read(source):
    """Reads what may be damaged and makes its page, without figures, unless an error is told."""
    try:
        loaded = results.load(source)
    except (ValueError, OSError) as error:
        told = str(error)
    else:
        page_without_figures("", loaded)
        return None
    assert str(source) in told
    return told


def page_without_figures(title, loaded):
    """The page in HTML and in Markdown."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "sensitivity", "floors", "by_devices"):
            patch.setattr(figures, name, lambda *what: b"png")
        found = analysis.data_sets([loaded], analysis.Clock(loaded.runs.values()))
        sections = page.sections([loaded], found)
    return render.html(title, sections), render.markdown(title, sections)


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """Where to put a damaged compact file, and the lines of a whole one."""
    source = tmp_path_factory.mktemp("compact") / "results.jsonl"
    results.save(finished(), source)
    assert told_or_read(source) is None
    return source.parent / "damaged.jsonl", source.read_text().splitlines()


@pytest.mark.slow
@settings(max_examples=200, derandomize=True)
@given(st.data())
def test_a_damaged_compact_file_is_told_or_harmless(compact, data):
    path, lines = compact
    rows = [json.loads(line) for line in lines]
    at = rows
    for _ in range(data.draw(st.integers(1, 4))):
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        key = data.draw(st.sampled_from(keys))
        holder, at = at, at[key]
        if not isinstance(at, dict | list) or not at:
            break
    if data.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = data.draw(st.sampled_from(DAMAGES))
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    told_or_read(path)


@settings(max_examples=50, derandomize=True)
@given(st.data())
def test_a_truncated_compact_file_is_told_or_harmless(compact, data):
    path, lines = compact
    whole = ("\n".join(lines) + "\n").encode()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary()))
    told_or_read(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("examples", [], "its evaluations have no examples"),
        ("examples", [0, 800, 400], "its evaluations have no examples"),
        ("train_loss", [1.0, -1.0, 0.5], "a training loss is missing or no float32 from 0 up"),
        ("train_loss", [1.0, 1.0, 1e300], "a training loss is missing or no float32 from 0 up"),
        ("train_loss", [1.0], "a training loss is missing or no float32 from 0 up"),
        ("test_accuracy", [0.1, 0.2, 1.5], "a test accuracy is missing or not in [0, 1]"),
        ("averaged", {"exponential": [[1.0], [0.5]]}, "averaged weights lack a loss"),
        ("variance", [1.0], "its gradient variances are not 40 numbers"),
        ("sizes", [[], [[16.5, 1]], *[[]] * 8], "its steps are not counted by batch sizes"),
        ("step_seconds", [[16, None]], "TypeError"),
        ("step_seconds", [[16, 0.0]], "the seconds of its steps are not positive numbers"),
        ("batch_sizes", [16.0], "its batch sizes are not 40 positive numbers"),
        ("summary", {"diverged": 0, "examples": 1, "steps": 1}, "its summary lacks diverged"),
        ("summary", {}, "KeyError: 'diverged'"),
        ("environment", 7, "IndexError"),
        ("name", "digits/other", "KeyError: 'digits/other'"),
    ],
)
def test_what_is_damaged_in_a_line_is_named(compact, key, value, message):
    path, (header, first, *rest) = compact
    path.write_text("\n".join([header, json.dumps(json.loads(first) | {key: value}), *rest]))
    error = told_or_read(path)
    assert f"{path} is damaged in line 2: " in error
    assert message in error
    assert error.endswith(".")


@pytest.mark.parametrize(
    "content", ["", "\0", "[" * 100_000, "{}", '{"plan": "", "environments": []}']
)
def test_what_is_no_compact_file_is_named(compact, content):
    compact[0].write_text(content)
    error = told_or_read(compact[0])
    assert "damaged.jsonl is no compact file of a sweep" in error
    assert error.endswith(".")


@pytest.mark.parametrize("content", ["", "\0", "[" * 100_000, "[]", "7\n", '{"x": }\n', b"\xff"])
@pytest.mark.parametrize(
    "name",
    [
        run_folder.CONFIG,
        run_folder.METRICS,
        run_folder.EVALUATIONS,
        run_folder.SUMMARY,
        sweep.ENVIRONMENT,
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    folder = whole_folder(tmp_path)
    assert results.load(tmp_path).missing == []
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"the run in {folder} is damaged: " in told_or_read(tmp_path)
    (folder / name).unlink()
    if name in (run_folder.METRICS, run_folder.EVALUATIONS, sweep.ENVIRONMENT):
        assert str(folder / name) in told_or_read(tmp_path)


@pytest.mark.parametrize("content", ["", "\0", "a = " + "[" * 100_000, "[datasets.x]\n"])
def test_a_damaged_plan_of_a_sweep_is_named(tmp_path, content):
    (tmp_path / sweep.PLAN).write_text(content)
    assert f"{tmp_path / sweep.PLAN} is damaged: " in told_or_read(tmp_path)
