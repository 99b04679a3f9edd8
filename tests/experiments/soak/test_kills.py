import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.soak import kills

STEPS = 40
OPTIONS = {"steps": STEPS, "width": 0.1, "learning_rate": 1.0, "lag": 1}


@pytest.mark.exhaustive  # what the soak does all along
def test_a_run_that_is_killed_at_random_moments_writes_what_a_whole_one_does(
    tmp_path, compilation_cache
):
    settings = {**compilation_cache, "jax_platforms": "cpu"}
    dice, out = random.Random(7), tmp_path / "killed"
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(kills.run_to_the_end, tmp_path / "whole", OPTIONS, settings)
        for _ in range(3):
            kills.run_and_kill(out, OPTIONS, dice, settings, every_steps=3)
        whole.result()
    kills.run_to_the_end(out, OPTIONS, settings, every_steps=3)
    assert kills.untimed(out) == kills.untimed(tmp_path / "whole")


@pytest.mark.exhaustive
def test_a_run_that_is_suspended_and_requeued_has_one_writer(tmp_path, compilation_cache):
    settings = {**compilation_cache, "jax_platforms": "cpu"}
    dice, out = random.Random(3), tmp_path / "killed"
    kills.run_to_the_end(tmp_path / "whole", OPTIONS, settings)
    suspended = False
    for _ in range(5):
        suspended = suspended or kills.suspend_and_requeue(out, OPTIONS, dice, settings, 3)
    assert suspended
    kills.run_to_the_end(out, OPTIONS, settings, every_steps=3)
    assert kills.untimed(out) == kills.untimed(tmp_path / "whole")
