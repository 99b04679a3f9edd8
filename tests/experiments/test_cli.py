import json
from pathlib import Path

import pytest

from experiments import cli

FILES = {"config.json", "metrics.jsonl", "evaluations.jsonl", "summary.json", "figure.png"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def status_of(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as exit_:
        return exit_.code


def test_run_writes_its_files_and_prints_where_the_figure_is(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["run", "--steps", "5", "--learning-rate", "0.2", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {*FILES, "checkpoints"}
    config = json.loads((out / "config.json").read_text())
    assert (config["dataset"], config["steps"], config["learning_rate"]) == ("digits", 5, 0.2)
    assert str(out / "figure.png") in capsys.readouterr().out


def test_without_out_each_run_gets_a_new_folder(tmp_path):
    for _ in range(2):
        assert cli.main(["run", "--method", "constant", "--steps", "2"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "digits-constant-1",
        "digits-constant-2",
    }


def test_without_arguments_three_runs_share_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMPARISON_EXAMPLES", 600)
    assert cli.main([]) == 0
    out = tmp_path / "runs" / "digits-comparison-1"
    assert {path.name for path in out.iterdir()} == {
        "cabs",
        "constant-16",
        "constant-128",
        "figure.png",
    }
    for name in ("cabs", "constant-16", "constant-128"):
        assert {path.name for path in (out / name).iterdir()} == FILES - {"figure.png"}
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert str(Path("runs/digits-comparison-1/figure.png")) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "sgd"], "unknown method 'sgd'; known methods: "),
        (["run", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["run", "--model", "resnet"], "unknown model 'resnet'"),
        (["run", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["run", "--steps", "0"], "steps must be at least 1, got 0"),
        (["run", "--round-to", "x"], "argument --round-to"),
        (["run", "--nesterov", "0.9"], "unrecognized arguments: --nesterov 0.9"),
        (["run", "--data-dir", "nowhere"], "nowhere"),
        (["bench", "speed"], "unknown benchmark 'speed'; known benchmarks:"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, tmp_path):
    assert status_of(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "set_up", None)
    (tmp_path / "summary.json").write_text("{}")
    assert cli.main(["run", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_bench_passes_its_options_on(monkeypatch):
    seen = []
    module = type("Module", (), {"main": staticmethod(lambda argv: seen.extend(argv))})
    monkeypatch.setattr(cli, "benchmark_names", lambda: ["fake"])
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["bench", "fake", "--batch-size", "16"]) == 0
    assert seen == ["--batch-size", "16"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["bench", "--help"]])
def test_help_is_available_everywhere(arguments, capsys):
    assert status_of(arguments) == 0
    assert "usage: python -m experiments" in capsys.readouterr().out
