"""Two processes and one folder: the second is refused, and the first learns of what was lost."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import cli
from experiments.training import run_folder
from experiments.training.checkpoint import FOLDER, Checkpoints, Schedule
from experiments.training.config import RunConfig
from experiments.training.lock import InUseError, locked
from experiments.training.train import set_up, train

pytestmark = pytest.mark.slow  # starts processes that train

HOLD = """
import sys, time
from pathlib import Path
from experiments.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def experiment(**options):
    return set_up(RunConfig(steps=6, width=0.1, evaluations=2, **options))


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a run in `tmp_path / "out"`."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out" / run_folder.LOCK)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_in_a_folder_is_refused_and_told_who_is_there(tmp_path, capsys):
    out = tmp_path / "out"

    def observe(metrics):
        if metrics["step"] == 2:
            before = (out / run_folder.METRICS).read_bytes()
            assert cli.main(["run", "--resume", "--out", str(out)]) == 2
            assert f"held by process {os.getpid()} on " in capsys.readouterr().err
            assert (out / run_folder.METRICS).read_bytes() == before

    train(experiment(), out, observe)
    assert len(run_folder.read(out).metrics["step"]) == 6
    assert not (out / run_folder.LOCK).exists()


def test_a_suspended_process_keeps_its_folder_and_a_killed_one_leaves_it(tmp_path, holder):
    job, out = experiment(), tmp_path / "out"
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(InUseError, match=f"held by process {holder.pid} on .* since "):
        train(job, out)
    holder.kill()
    holder.wait()
    assert (out / run_folder.LOCK).exists()
    assert train(job, out)["steps"] == 6


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_run_whose_folder_is_removed_ends_with_an_error(tmp_path, checkpoints):
    out = tmp_path / "out"

    def observe(metrics):
        if metrics["step"] == 2:
            shutil.rmtree(out)

    with (
        pytest.raises(OSError, match="out was removed, or taken by somebody"),
        Checkpoints(out / FOLDER if checkpoints else None, Schedule()) as writer,
    ):
        train(experiment(), out, observe, checkpoints=writer)
    assert not (out / run_folder.SUMMARY).exists()


def test_a_folder_that_another_process_took_over_is_left_to_it(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as check:
        path.unlink()
        with locked(path), pytest.raises(OSError, match=f"taken by process {os.getpid()}"):
            check()
