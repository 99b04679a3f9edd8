"""A sweep of digits: killed, resumed, with runs that diverge and fail, and the report on it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, report
from experiments.report import analysis, results
from experiments.sweeps import plan, pool, sweep, worker
from experiments.training import lock, run_folder

pytestmark = pytest.mark.slow  # starts processes that each compile what they train

PLAN = """
title = "Tiny"
examples = 600
evaluations = 3
evaluation_examples = 100
max_batch_size = 32
round_to = "buckets"
learning_rates = [0.2, 3e38]

[datasets.digits]
[datasets.lost]
dataset = "no/such/folder"
learning_rates = [0.2]
methods = ["constant-16"]

[methods.cabs]
title = "CABS"
[methods.constant-16]
title = "constant 16"
method = "constant"
"""
DIGITS = [run.name for run in plan.parse(PLAN).runs if run.dataset == "digits"]
TIMEOUT = 120  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sweep, killed after its first run and then made to the end."""
    base = tmp_path_factory.mktemp("sweep")
    (base / "plan.toml").write_text(PLAN)
    out = base / "out"
    command = ["sweep", str(base / "plan.toml"), "--out", str(out)]
    first = subprocess.Popen([sys.executable, "-m", "experiments", *command])
    try:
        until = time.monotonic() + TIMEOUT
        while not (out / DIGITS[0] / run_folder.SUMMARY).exists():
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not all((out / name).exists() for name in DIGITS)
    kept = out / DIGITS[0] / run_folder.SUMMARY
    before = kept.stat().st_mtime_ns
    remains = out / f"{DIGITS[-1]}{worker.PARTIAL}1"
    under_way_elsewhere = out / "digits" / "cabs" / f"lr-0.2-seed-7{worker.PARTIAL}1"
    remains.mkdir(parents=True)
    under_way_elsewhere.mkdir(parents=True)

    assert cli.main([*command, "--jobs", "2"]) == 1  # the lost data set
    assert kept.stat().st_mtime_ns == before
    assert not remains.exists()
    under_way_elsewhere.rmdir()
    return out


def test_a_killed_sweep_goes_on_to_the_end(folder):
    for name in DIGITS:
        assert run_folder.read_summary(folder / name)["examples"] > 0
    assert not list(folder.glob(f"*/*/*{worker.PARTIAL}*"))


def test_a_failed_run_leaves_its_error_and_stops_no_other(folder):
    (error,) = folder.glob(f"**/*{worker.ERROR}")
    assert error.relative_to(folder) == Path(f"lost/constant-16/lr-0.2-seed-0{worker.ERROR}")
    assert "unknown data set 'no/such/folder'" in error.read_text()


def test_a_diverged_run_is_recorded_as_diverged(folder):
    diverged = {name: run_folder.read_summary(folder / name)["diverged"] for name in DIGITS}
    assert diverged == {name: "lr-3e+38" in name for name in DIGITS}


def test_a_run_without_progress_is_told_as_such():
    summary = {"diverged": False, "without_progress": True, "steps": 19, "train_loss": 2.3}
    line = sweep._line(plan.parse(PLAN).runs[0], summary | {"test_accuracy": None})
    assert line == f"{DIGITS[0]}: ended without progress after 19 steps, loss 2.3000"


def test_methods_of_a_seed_start_alike_and_see_the_same_examples(folder):
    cabs, constant = (
        run_folder.read(folder / f"digits/{method}/lr-0.2-seed-0")
        for method in ("cabs", "constant-16")
    )
    assert cabs.evaluations["train_loss"][0] == constant.evaluations["train_loss"][0]
    assert cabs.metrics["loss"][0] == pytest.approx(constant.metrics["loss"][0], rel=1e-5)


def test_a_finished_sweep_makes_nothing_again_and_refuses_another_plan(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    runs = [run for run in plan.parse(PLAN).runs if run.dataset == "digits"]
    assert sweep.sweep(PLAN, runs, copy) == sweep.Outcome(len(runs), 0, 0, {}, {})
    longer = PLAN.replace("examples = 600", "examples = 700")
    with pytest.raises(sweep.SweepError, match="has examples 600, now 700"):
        sweep.sweep(longer, plan.parse(longer).runs, copy)


def test_a_run_whose_process_dies_is_told_and_the_next_gets_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "work", os._exit)  # called with the arguments of `work`, it dies
    runs = plan.parse(PLAN).runs[:3]
    outcome = sweep.sweep(PLAN, runs, tmp_path, jobs=2)
    assert outcome.failed.keys() == {run.name for run in runs}
    assert outcome.finished == 0
    for run in runs:
        assert "its process died" in (tmp_path / (run.name + worker.ERROR)).read_text()


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path):
    runs = [run for run in plan.parse(PLAN).runs if run.name == DIGITS[0]]
    final = tmp_path / DIGITS[0]
    theirs = final.with_name(f"{final.name}{worker.PARTIAL}1") / run_folder.METRICS
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    with lock.locked(final.with_name(final.name + run_folder.LOCK)):
        outcome = sweep.sweep(PLAN, runs, tmp_path)
        assert theirs.exists()
    assert outcome.finished == 0
    assert f"process {os.getpid()} on " in outcome.elsewhere[DIGITS[0]]
    assert not (tmp_path / (DIGITS[0] + worker.ERROR)).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "nowhere.toml"),
        (["plan.toml", "--shard", "3/2"], "got 3/2"),
        (["plan.toml", "--shard", "half"], "give I/N, such as 1/4, not 'half'"),
        (["plan.toml", "--datasets", "digits,svhn"], "no data set 'svhn'; it has digits, lost"),
        (["plan.toml", "--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(PLAN)
    assert cli.main(["sweep", *arguments, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_can_be_made_again_from_its_compact_file(folder, tmp_path):
    compact, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    markdown, html = report.write(report.load([folder]), tmp_path / "first")
    results.save(results.load(folder), compact)
    results.save(results.load(compact), again)
    assert again.read_text() == compact.read_text()
    second, _ = report.write(report.load([compact]), tmp_path / "second")
    for path in markdown.parent.rglob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.relative_to(markdown.parent).as_posix() in markdown.read_text()
    assert 'src="data:image/png;base64,' in html.read_text()
    assert 'src="figures' not in html.read_text()
    # Five digits are kept: what is shown has three.
    assert second.read_text().splitlines()[:12] == markdown.read_text().splitlines()[:12]


def test_the_report_names_what_is_missing_and_what_diverged(folder, tmp_path):
    text = report.write(report.load([folder]), tmp_path)[0].read_text()
    assert "4 of 5 runs, 2 of which diverged" in text
    assert "- missing, lost, constant-16: seed 0, α 0.2" in text
    assert "- diverged, digits, cabs, constant-16: seed 0, α 3e+38" in text
    for question in ("RQ1", "RQ2", "RQ3", "RQ4"):
        assert f"**{question}**" in text


def test_thinned_results_keep_what_the_runs_measured(folder):
    loaded = results.load(folder)
    assert [run.name for run in loaded.missing] == ["lost/constant-16/lr-0.2-seed-0"]
    name = "digits/cabs/lr-0.2-seed-0"
    record, result = run_folder.read(folder / name), loaded.runs[name]
    size = record.metrics["batch_size"]
    steps = {s: int((size == s).sum()) for s in set(size.astype(int).tolist())}
    counted = {s: sum(i.get(s, 0) for i in result.sizes) for s in steps}
    assert counted == steps
    assert result.batch_sizes.mean() == pytest.approx((size * size).sum() / size.sum())
    diverged = loaded.runs["digits/cabs/lr-3e+38-seed-0"]
    start = analysis.untrained(diverged)
    assert np.exp(analysis.log_final(diverged, analysis.LAST)) == pytest.approx(start)


@pytest.mark.parametrize("content", ["", "{}\n", '{"plan": 3}\n', "no JSON\n"])
def test_what_is_no_sweep_has_no_report(content, tmp_path, capsys):
    source = tmp_path / "results.jsonl"
    source.write_text(content)
    assert cli.main(["report", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "results.jsonl is no compact file of a sweep" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no sweep.toml" in capsys.readouterr().err


def test_the_committed_plans_can_be_read():
    folder = Path(cli.__file__).parent / "configs"
    texts = [path.read_text() for path in folder.glob("*.toml")]
    assert texts
    for text in texts:
        assert plan.parse(text).runs
    compacts = (folder.parent / "results").rglob("*.jsonl")
    for compact in (path for path in compacts if path.parent.name != "digits"):  # of no sweep
        assert json.loads(compact.read_text().splitlines()[0])["plan"] in texts
