"""Two processes train as one, and end together whatever happens to either."""

import atexit
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import cli
from experiments.soak import kills
from experiments.training import run_folder

RUN = ["run", "--method", "noise_scale", "--width", "0.2", "--max-batch-size", "128"]
SOON = 60  # seconds, on a busy machine; JAX alone takes 312
FORKED = multiprocessing.get_context("forkserver")


def command(words, said, settings, cache, largest_file):
    """Runs the command with settings of JAX, and with its stderr in the file `said`."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    os.environ["XDG_CACHE_HOME"] = cache
    for name, value in settings.items():
        jax.config.update(name, value)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    status = cli.main(words)
    atexit._run_exitfuncs()  # the good order of JAX's end, which such a process would leave out
    sys.exit(status)


class Pod:
    """Starts processes of `run`, two of which may be a pair, and ends them all.

    They are forked from one that has imported everything, which takes longer than most of them.
    """

    def __init__(self, folder, settings):
        self._settings = {**settings, "jax_platforms": "cpu", "jax_num_cpu_devices": 2}
        self._cache = str(folder / "said" / "cache")  # of decoded images
        self._folder, self._started = folder, []
        (folder / "said").mkdir()
        FORKED.set_forkserver_preload(kills.PRELOADED)

    def start(self, name, *options, largest_file=None):
        said = self._folder / "said" / str(len(self._started))
        words = [*RUN, "--out", str(self._folder / name), *options]
        arguments = words, said, self._settings, self._cache, largest_file
        process = FORKED.Process(target=command, args=arguments)
        process.start()
        process.said = said
        self._started.append(process)
        return process

    def pair(self, *options, alone=((), ()), largest_file=None, name="from"):
        """Two processes, each with the options of both and those that it has `alone`.

        The first writes no file that is larger than `largest_file` bytes.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
        return [
            self.start(
                f"{name}-{index}",
                *(*where, "--process-id", str(index)),
                *(*options, *alone[index]),
                largest_file=None if index else largest_file,
            )
            for index in range(2)
        ]

    def close(self):
        for process in self._started:
            process.kill()
            process.join()


@pytest.fixture
def pod(tmp_path, compilation_cache):
    pod = Pod(tmp_path, compilation_cache)
    yield pod
    pod.close()


def wait_until(happened, process):
    ends = time.monotonic() + 150
    while not happened():
        time.sleep(0.05)
        assert process.is_alive(), process.said.read_text()
        assert time.monotonic() < ends


def status(process, timeout=150):
    """The exit status, None if the process has not ended in so many seconds."""
    process.join(timeout)
    return process.exitcode


def ends(pair):
    """The status and the last line of each, once both have ended, soon after each other."""
    statuses = [status(process) for process in pair]
    said = [process.said.read_text().splitlines()[-1] for process in pair]
    return list(zip(statuses, said, strict=True))


def steps_written(folder):
    path = folder / run_folder.METRICS
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_one_and_only_the_first_writes(tmp_path, pod):
    single = pod.start("single", "--steps", "12")
    pair = pod.pair("--steps", "12", "--checkpoint-every-steps", "4")
    wait_until((tmp_path / "from-0" / "checkpoints" / "4").exists, pair[0])
    for one in pair:
        one.kill()
        one.join()
    pair = pod.pair("--steps", "12", "--resume")
    assert [status(one) for one in (single, *pair)] == [0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"single", "from-0", "said"}
    single, together = run_folder.read(tmp_path / "single"), run_folder.read(tmp_path / "from-0")
    assert len(set(single.metrics["batch_size"])) > 2
    np.testing.assert_array_equal(together.metrics["step"], single.metrics["step"])
    np.testing.assert_array_equal(together.metrics["batch_size"], single.metrics["batch_size"])
    np.testing.assert_allclose(together.metrics["loss"], single.metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(
        together.evaluations["test_loss"], single.evaluations["test_loss"], rtol=1e-4
    )


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_both(tmp_path, pod):
    (tmp_path / "from-0").mkdir()
    run_folder.write_json(tmp_path / "from-0" / run_folder.CONFIG, {"method": "cabs"})
    first, second = ends(pod.pair("--steps", "12", "--resume"))
    assert first[0] == second[0] == 2
    assert first[1].startswith("error: the run in ")
    assert "method 'cabs', now 'noise_scale'" in first[1]
    assert second[1] == f"process 0: {first[1]}"


@pytest.mark.exhaustive  # what the first refuses, too, ends both
def test_a_full_disk_ends_both_and_leaves_the_lines_before(tmp_path, pod):
    first, second = ends(pod.pair("--steps", "1000", largest_file=8 * 1024))
    assert first[0] == second[0] == 2
    assert "File too large" in first[1]
    assert second[1] == f"process 0: {first[1]}"
    assert steps_written(tmp_path / "from-0") > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alone", "why"),
    [
        (
            ("--steps", "12"),
            "error: the processes differ in options: steps is 1000 on process 0 and 12",
        ),
        pytest.param(
            ("--resume", "--steps", "1000"),
            "options: resume is False on process 0 and True",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ("--steps", "0"),
            "error: steps must be at least 1, got 0.",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_other_options_end_both_before_the_first_step(tmp_path, pod, alone, why):
    told = ends(pod.pair(alone=(("--steps", "1000"), alone)))
    assert [status for status, _ in told] == [2, 2]
    assert [line for _, line in told if why not in line] == []
    assert not steps_written(tmp_path / "from-0")


@pytest.mark.slow
def test_other_data_under_one_name_ends_both_before_the_first_step(tmp_path, pod):
    for index in range(2):
        for split in ("train", "test"):
            for label in range(2):
                folder = tmp_path / f"data-{index}" / "images" / split / str(label)
                folder.mkdir(parents=True)
                Image.new("L", (8, 8), 50 * index + label).save(folder / "0.png")
    roots = [("--data-dir", str(tmp_path / f"data-{index}")) for index in range(2)]
    told = ends(
        pod.pair("--dataset", "images", "--model", "digits_mlp", "--steps", "12", alone=roots)
    )
    assert [status for status, _ in told] == [2, 2]
    assert all("error: the processes differ in data: fingerprint is " in line for _, line in told)
    assert not steps_written(tmp_path / "from-0")


@pytest.mark.exhaustive  # waits 15 s for signs; that a process is killed is tested by default below
def test_a_process_that_dies_or_is_cut_off_ends_the_other(tmp_path, pod):
    numbers = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
    pairs = {name: pod.pair("--steps", "100000", name=name) for name in numbers}
    for name, (first, second) in pairs.items():
        wait_until(lambda: steps_written(tmp_path / f"{name}-0") > 3, first)
        os.kill(second.pid, numbers[name])
    for first, _ in pairs.values():
        assert status(first, SOON) == 1
        assert "process 1: error: it died, or gave no sign for 15 s." in first.said.read_text()


@pytest.mark.slow
def test_jax_ends_the_others_where_the_first_process_is_killed(tmp_path, pod):
    first, second = pod.pair("--steps", "100000")
    wait_until(lambda: steps_written(tmp_path / "from-0") > 3, first)
    os.kill(first.pid, signal.SIGKILL)
    assert status(second, SOON) in (-signal.SIGABRT, 1)  # 1 was seen on jax 0.9
    assert "another task died" in second.said.read_text()
