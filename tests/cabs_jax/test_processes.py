"""Several processes train as one, and another number of them takes over."""

import pathlib

import numpy as np
import pytest

from tests import processes

PROGRAM = pathlib.Path(__file__).with_name("train_as_process.py")
STEPS = 4


def start(count, devices, **request):
    return processes.start(PROGRAM, count, {"devices": devices, **request})


def examples(results):
    """The sets of examples of each batch, after checking that no two processes share one."""
    for parts in zip(*(result["local"] for result in results), strict=True):
        together = [index for part in parts for index in part]
        assert len(set(together)) == len(together)
        yield set(together)


@pytest.mark.slow
def test_processes_train_as_one_and_another_number_of_them_takes_over(tmp_path):
    saved = str(tmp_path / "checkpoint.npz")
    started = start(1, 4, steps=2 * STEPS), start(2, 2, steps=STEPS, save=saved)
    (expected,), two = map(processes.results, started)
    four = processes.results(start(4, 1, steps=STEPS, checkpoint=saved))

    assert len(set(expected["sizes"])) > 2
    for first, second in zip(two + two, four, strict=True):
        assert first["sizes"] + second["sizes"] == expected["sizes"]
        losses = first["losses"] + second["losses"]
        np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    for result in four:
        for name, parameter in expected["params"].items():
            np.testing.assert_allclose(result["params"][name], parameter, rtol=1e-4, atol=1e-6)
    assert [*examples(two), *examples(four)] == [set(batch) for batch in expected["local"]]
    for results in (two, four):
        read = [index for result in results for index in result["read"]]
        assert len(set(read)) == len(read)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_an_error():
    request = {"devices": 1, "steps": 10**9, "die": [1, 3], "heartbeat": 10}
    started = processes.start(PROGRAM, 2, request)
    try:
        assert started[0].wait(timeout=processes.TIMEOUT) != 0
    finally:
        for process in started:
            process.kill()
            process.communicate()
