import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.training import run_folder

RUN = [sys.executable, "-m", "experiments", "run", "--steps", "12", "--method", "noise_scale"]
RUN += ["--width", "0.2", "--max-batch-size", "128"]


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_one_and_only_the_first_writes(
    tmp_path, compilation_cache
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {**compilation_cache, "jax_platforms": "cpu", "jax_num_cpu_devices": 2}
    environment = {**os.environ, **{name.upper(): str(x) for name, x in settings.items()}}

    def run(name, *options):
        command = [*RUN, "--out", str(tmp_path / name), *options]
        return subprocess.Popen(command, env=environment)

    def pair(*options):
        where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
        for index in range(2):
            who = ["--distributed", *where, "--process-id", str(index)]
            yield run(f"from-{index}", *who, *options)

    started = [run("single"), *pair("--checkpoint-every-steps", "4")]
    try:
        checkpoint = tmp_path / "from-0" / "checkpoints" / "4"
        while not checkpoint.exists():
            time.sleep(0.05)
            assert started[1].poll() is None, "ended without a checkpoint"
        for one in started[1:]:
            one.kill()
            one.wait()
        started[1:] = pair("--resume")
        assert [one.wait(timeout=150) for one in started] == [0, 0, 0]
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"single", "from-0"}
    single, together = run_folder.read(tmp_path / "single"), run_folder.read(tmp_path / "from-0")
    assert len(set(single.metrics["batch_size"])) > 2
    np.testing.assert_array_equal(together.metrics["step"], single.metrics["step"])
    np.testing.assert_array_equal(together.metrics["batch_size"], single.metrics["batch_size"])
    np.testing.assert_allclose(together.metrics["loss"], single.metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(
        together.evaluations["test_loss"], single.evaluations["test_loss"], rtol=1e-4
    )
