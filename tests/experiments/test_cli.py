import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import App

from experiments import cli
from experiments.commands import bench, compare, run
from experiments.errors import Interrupted, UserError

COMMANDS = ("run", "sweep", "report", "soak", "bench", "compare", "variances", "branch")
BENCHMARKS = ("loader", "moments", "peers", "scaling", "step")
FILES = {"config.json", "metrics.jsonl", "evaluations.jsonl", "summary.json", "figure.png"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, compilation_cache):
    monkeypatch.chdir(tmp_path)


def test_run_writes_its_files_and_prints_where_the_figure_is(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["run", "--steps", "5", "--learning-rate", "0.2", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {*FILES, "checkpoints"}
    config = json.loads((out / "config.json").read_text())
    assert (config["dataset"], config["steps"], config["learning_rate"]) == ("digits", 5, 0.2)
    assert str(out / "figure.png") in capsys.readouterr().out


@pytest.mark.slow  # trains whole runs
def test_a_finished_run_without_its_figure_is_resumed_to_the_figure(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["run", "--steps", "5", "--out", str(out)]) == 0
    written = {
        path.name: path.read_bytes() for path in out.iterdir() if path.suffix.startswith(".json")
    }
    (out / "figure.png").unlink()
    assert cli.main(["run", "--resume", "--out", str(out)]) == 0
    assert "whose figure was missing" in capsys.readouterr().out
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert {name: (out / name).read_bytes() for name in written} == written
    assert cli.main(["run", "--resume", "--out", str(out)]) == 0
    assert "there is nothing to resume" in capsys.readouterr().out


@pytest.mark.slow  # trains whole runs
def test_a_summary_that_is_none_does_not_pass_for_a_finished_run(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["run", "--steps", "2", "--out", str(out)]) == 0
    (out / "summary.json").write_text("")
    assert cli.main(["run", "--resume", "--out", str(out)]) == 2
    assert "summary.json is damaged" in capsys.readouterr().err


@pytest.mark.slow  # trains whole runs
def test_without_out_each_run_gets_a_new_folder(tmp_path):
    for _ in range(2):
        assert cli.main(["run", "--method", "constant", "--steps", "2"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "digits-constant-1",
        "digits-constant-2",
    }


@pytest.mark.slow
def test_without_arguments_methods_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ENDS", (320, 640))
    monkeypatch.setattr(compare, "LEARNING_RATES", (0.1, 0.5))
    monkeypatch.setattr(compare, "LOG_SECONDS", 0.2)
    assert cli.main([]) == 0
    out = tmp_path / "runs" / "comparison-1"
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "figure.png"}
    runs = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(runs) == 2 * 4 * 2 * 3
    assert all(640 <= run["examples"] < 768 for run in runs)
    assert {run["steps"] for run in runs if run["method"] == "constant 128"} == {5}
    printed = capsys.readouterr().out
    assert "wrong: compiling" in printed
    assert "CABS, estimated, w̄" in printed
    assert str(Path("runs/comparison-1/figure.png")) in printed
    assert cli.main(["compare", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "sgd"], "unknown method 'sgd'; known methods: "),
        (["run", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["run", "--model", "resnet"], "unknown model 'resnet'"),
        (["run", "--steps", "many"], 'for --steps: unable to convert "many" into int'),
        (["run", "--steps", "0"], "steps must be at least 1, got 0"),
        (["run", "--round-to", "x"], "round_to must be a positive integer or 'buckets', got 'x'"),
        (["run", "--nesterov", "0.9"], "Unknown option: --nesterov"),
        (["run", "--data-dir", "nowhere"], "nowhere"),
        (["run", "--step", "3"], "Unknown option: --step. Did you mean --steps?"),
        (["run", "--no-resume"], "Unknown option: --no-resume"),
        (["run", "--resume"], "--resume needs --out"),
        (["run", "--out", "o[lr=0.1]"], "could not be read again, for '[' is in its path"),
        (["run", "--process-id", "0"], "--process-id goes with --distributed"),
        (["run", "3"], "Unused Tokens: ['3']"),
        (["report", "there"], "give a sweep, and --out, --compact or --next"),
        (["bench", "speed"], "unknown command 'speed'; known commands: gpu, idioms, loader, "),
        (["bench", "step", "--parts", "lag", "fun"], "choose from against_sgd, overhead, "),
        (["bench", "step", "--parts"], "--parts"),
        (["fly"], "unknown command 'fly'; known commands: bench, "),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, tmp_path):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "set_up", None)
    (tmp_path / "summary.json").write_text("{}")
    assert cli.main(["run", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_bench_passes_its_options_on(monkeypatch):
    seen = []
    fake = App(name="bench")
    monkeypatch.setattr(bench, "main", fake)

    @fake.command
    def fast(*, batches: tuple[int, ...] = (), quick: bool = False):
        seen.append((batches, quick))

    assert cli.main(["bench", "fast", "--batches", "16", "32", "--quick"]) == 0
    assert seen == [((16, 32), True)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Interrupted(signal.SIGTERM, "after step 3"), 143),
        (KeyboardInterrupt(), 130),
        (UserError("it is\nfull."), 2),
    ],
)
def test_how_a_command_ends_is_its_exit_status(error, status, monkeypatch, capsys):
    def end():
        raise error

    monkeypatch.setattr(compare, "main", end)
    assert cli.main([]) == status
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in COMMANDS), *(["bench", name] for name in BENCHMARKS)]
)
def test_help_is_available_everywhere(arguments, capsys):
    if arguments == ["bench", "loader"]:
        pytest.importorskip("grain")
    assert cli.main([*arguments, "--help"]) == 0
    assert f"Usage: {' '.join(['python -m experiments', *arguments])}" in capsys.readouterr().out


@pytest.mark.slow
def test_help_and_mistakes_in_the_command_import_no_command():
    code = "import sys, experiments.cli as c; c.main(sys.argv[1:]); print('jax' in sys.modules)"
    for arguments in (["--help"], ["bench", "--help"], ["fly"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "False", done.stderr
