import json

import pytest

from experiments import cli
from experiments.benchmarks import _idioms


def check(idioms, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["bench", "idioms", "--quick", "--batches", "8", "--idioms", *idioms]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["model"], cell["column"]) for cell in cells] == [
        (idiom, column) for idiom in idioms for column in ("plain", "trace", "diagonal")
    ]
    for cell in cells:
        assert cell["compile_ratio"] > 0
        assert cell["column"] == "plain" or cell["variance_error"] < 1e-5
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {idiom} ") == 1 for idiom in idioms)


@pytest.mark.slow
def test_an_idiom_has_a_row_with_small_errors(tmp_path, capsys):
    check(["table[i]"], tmp_path, capsys)


@pytest.mark.exhaustive
def test_all_idioms_are_measured(tmp_path, capsys):
    check(_idioms.NAMES, tmp_path, capsys)
