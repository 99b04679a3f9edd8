import random
from collections import Counter

import numpy as np
import pytest

import cabs_jax
from experiments.datasets import images
from experiments.soak import attacks, soak


@pytest.mark.slow
def test_a_faulty_stream_is_read_to_the_last_example(monkeypatch):
    monkeypatch.setattr(soak, "BATCHES_A_ROUND", 60)
    monkeypatch.setattr(soak, "FAULT_RATE", 2e-3)
    monkeypatch.setattr(soak, "NAN_RATE", 0.2)
    monkeypatch.setattr(soak, "RESTART_RATE", 0.2)
    counts = Counter()
    soak.read_and_train(soak.make_step(), random.Random(1), counts)
    assert counts["batches"] == 60
    assert counts["examples"] > 1000
    for what in (
        "batches with NaN",
        "records that raised",
        "records of another shape",
        "restarts of the stream",
    ):
        assert counts[what] > 0, what


@pytest.mark.slow
def test_an_example_that_comes_twice_ends_the_soak(monkeypatch):
    def repeating(self, index):
        return {"x": np.zeros(soak.FEATURES, np.float32), "index": index // 2}

    monkeypatch.setattr(soak.FaultySource, "__getitem__", repeating)
    with pytest.raises(soak.SoakError, match="an example came twice"):
        soak.read_and_train(soak.make_step(), random.Random(1), Counter())


def test_growth_of_memory_threads_or_files_is_a_leak():
    warm = soak.Resources(memory=100.0, threads=2, files=3)
    flat = [warm] * (soak.WARM_ROUNDS + 1)
    assert "none in the 1 rounds" in soak.check_for_leaks(flat)
    for change in ({"memory": 120.0}, {"threads": 3}, {"files": 4}):
        with pytest.raises(soak.SoakError, match=r"memory grew|leak"):
            soak.check_for_leaks([*flat, warm._replace(**change)])


def test_leaks_are_not_judged_by_rounds_that_only_warm_up():
    growing = [soak.Resources(100.0 * i, 2, 3) for i in range(1, soak.WARM_ROUNDS + 1)]
    assert "not judged" in soak.check_for_leaks(growing)


@pytest.mark.parametrize(
    ("what", "counted"),
    [
        (attacks.read_together, "batches by two readers"),
        (attacks.fork, "forks"),
    ],
)
def test_readers_and_forks_get_each_example_once(what, counted):
    counts = Counter()
    for seed in range(3):
        what(random.Random(seed), counts)
    assert counts[counted] >= 3


def test_a_loader_that_gives_readers_an_example_twice_ends_the_soak(monkeypatch):
    taken = cabs_jax.BatchLoader.__next__
    monkeypatch.setattr(cabs_jax.BatchLoader, "__next__", lambda loader: taken(loader) // 2)
    with pytest.raises(attacks.AttackError, match="of two readers' examples"):
        attacks.read_together(random.Random(1), Counter())


def test_moved_images_have_the_labels_of_their_folders_and_a_stale_cache_ends_the_soak(
    tmp_path, monkeypatch
):
    counts = Counter()
    attacks.move_files(tmp_path / "right", random.Random(1), counts)
    assert counts["files moved"] == 2 * attacks.MOVES
    monkeypatch.setattr(images, "_content_key", lambda path: "0")
    with pytest.raises(attacks.AttackError, match="are not where they lie"):
        attacks.move_files(tmp_path / "stale", random.Random(1), counts)
