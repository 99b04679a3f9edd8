import json
import os

import numpy as np
import pytest

from experiments.training import run_folder


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_missing_or_empty_folder_may_be_used(tmp_path, make):
    make(tmp_path / "out")
    run_folder.check_unused(tmp_path / "out")


def test_a_folder_with_anything_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        run_folder.check_unused(tmp_path)
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        run_folder.check_unused(tmp_path / "notes.txt")


def test_fresh_folders_never_repeat(tmp_path):
    folders = {run_folder.fresh_folder(tmp_path / "runs", "digits") for _ in range(3)}
    assert {folder.name for folder in folders} == {"digits-1", "digits-2", "digits-3"}
    assert all(folder.is_dir() for folder in folders)


def test_numbers_that_are_not_finite_become_null_and_come_back_as_nan(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("inf")}]
    (tmp_path / run_folder.METRICS).write_text("".join(map(run_folder.to_json, rows)))
    (tmp_path / run_folder.EVALUATIONS).write_text("")
    run_folder.write_json(tmp_path / run_folder.CONFIG, {"method": "cabs"})
    summary = {**dict.fromkeys(run_folder.SUMMARY_KEYS, 1), "train_loss": float("nan")}
    run_folder.write_json(tmp_path / run_folder.SUMMARY, summary)
    assert json.loads((tmp_path / run_folder.SUMMARY).read_text())["train_loss"] is None

    run = run_folder.read(tmp_path)
    np.testing.assert_array_equal(run.metrics["loss"], [0.5, np.nan])
    assert run.config == {"method": "cabs"}


def test_write_json_replaces_a_file_whole_and_leaves_no_other(tmp_path):
    path = tmp_path / "summary.json"
    run_folder.write_json(path, {"steps": 1})
    run_folder.write_json(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = run_folder._sync, os.replace
    monkeypatch.setattr(run_folder, "_sync", lambda p: (done.append(p.name), sync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    run_folder.write_json(tmp_path / "summary.json", {"steps": 1})
    assert done == ["summary.json.partial", "renamed", tmp_path.name]


def test_what_a_link_points_to_is_not_written(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f"summary.json{run_folder.PARTIAL}").symlink_to(tmp_path / "mine")
    run_folder.write_json(tmp_path / "summary.json", {"steps": 1})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "summary.json").is_symlink()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1\n", "is damaged: TypeError"),
        ("[1]\n", "is damaged: IndexError"),
        ('{"examples": 1}\n{"loss": 1}\n', "is damaged: KeyError"),
        ('{"examples": "x"}\n', "is damaged: ValueError"),
        ('{"examples": 1%s}\n' % ("0" * 400), "is damaged: OverflowError"),
        ("[" * 100_000 + "\n", "is damaged: RecursionError"),
        ("\xff\n", "is damaged: UnicodeDecodeError"),
        ('{"examples": [1]}\n', "is damaged: it holds lists where numbers belong"),
    ],
)
def test_lines_that_are_not_a_runs_are_named(tmp_path, lines, message):
    (tmp_path / run_folder.METRICS).write_text(lines, "latin-1")
    with pytest.raises(run_folder.ResumeError, match=rf"metrics\.jsonl {message}"):
        run_folder.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "summary.json is damaged: Expecting value"),
        ("[" * 100_000, "summary.json is damaged: "),
        ("3", "summary.json is damaged: it holds no JSON object"),
        ('{"accuracy": 1}', "summary.json is no summary of a run, for it lacks train_loss, "),
    ],
)
def test_a_summary_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / run_folder.SUMMARY).write_text(text)
    with pytest.raises(run_folder.ResumeError, match=message):
        run_folder.read_summary(tmp_path)
