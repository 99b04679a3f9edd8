"""What is kept on disk: found again, verified, bounded, and never in the way."""

import json
import os
import threading

import numpy as np
import pytest

from experiments.datasets import cache, fingerprint
from experiments.datasets.dataset import make_dataset
from tests.experiments.datasets.data_files import some_images

KEY = "0123456789abcdef" * 2
OTHER_KEY = "f" * 32


def make(seed: int = 0):
    images, labels = some_images(seed, 6, 5, 4, 3), np.arange(6) % 2
    return make_dataset("toy", (images, labels), (images[:2], labels[:2]), ("a", "b"))


def must_not_make():
    raise AssertionError("this is in the cache")


def entry(folder, key=KEY):
    return folder / "decoded" / key


def test_what_was_made_is_found_again_under_any_name(tmp_path):
    made = cache.load_or_make("toy", KEY, tmp_path, make)
    found = cache.load_or_make("other", KEY, tmp_path, must_not_make)
    assert (made.name, found.name) == ("toy", "other")
    assert fingerprint(made) == fingerprint(found) == fingerprint(make())
    assert not found.train["input"].flags.writeable
    other = cache.load_or_make("toy", OTHER_KEY, tmp_path, lambda: make(1))
    assert fingerprint(other) == fingerprint(make(1))


def flip_a_pixel(folder):
    content = bytearray((folder / "train_input.npy").read_bytes())
    content[-7] ^= 1
    (folder / "train_input.npy").write_bytes(content)


def flip_a_label(folder):
    labels = np.load(folder / "test_label.npy")
    np.save(folder / "test_label.npy", labels[::-1])


def rename_a_class(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"class_names": ["a", "c"]}))


def cut_a_header(folder):
    content = (folder / "test_label.npy").read_bytes()
    (folder / "test_label.npy").write_bytes(content.replace(b"(2,)", b"(2, "))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_pixel,
        cut_a_header,
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        flip_a_label,
        rename_a_class,
        lambda folder: os.truncate(folder / "train_input.npy", 300),
        lambda folder: os.truncate(folder / "train_label.npy", 0),
        lambda folder: (folder / "test_input.npy").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\0"),
        lambda folder: np.save(folder / "test_label.npy", np.array([{}]), allow_pickle=True),
    ],
)
def test_a_damaged_entry_is_named_and_made_again(tmp_path, damage):
    cache.load_or_make("toy", KEY, tmp_path, make)
    damage(entry(tmp_path))
    with pytest.warns(UserWarning, match=f"{KEY}: damaged cache, decoded again: .*"):
        again = cache.load_or_make("toy", KEY, tmp_path, make)
    assert fingerprint(again) == fingerprint(make())
    found = cache.load_or_make("toy", KEY, tmp_path, must_not_make)
    assert fingerprint(found) == fingerprint(make())


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not cache toy"):
        dataset = cache.load_or_make("toy", KEY, tmp_path / "file", make)
    assert fingerprint(dataset) == fingerprint(make())


def test_what_lies_in_the_cache_and_is_no_entry_is_in_no_ones_way(tmp_path):
    (tmp_path / "decoded").mkdir()
    (tmp_path / "decoded" / OTHER_KEY).write_text("somebody's")
    cache.load_or_make("toy", KEY, tmp_path, make)
    cache.load_or_make("toy", KEY, tmp_path, must_not_make)
    assert (tmp_path / "decoded" / OTHER_KEY).read_text() == "somebody's"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        with pytest.warns(UserWarning, match="disk full"):
            dataset = cache.load_or_make("toy", KEY, tmp_path, make)
    assert fingerprint(dataset) == fingerprint(make())
    assert list((tmp_path / "decoded").iterdir()) == []


def test_a_cache_that_only_others_may_write_is_read(tmp_path, monkeypatch):
    cache.load_or_make("toy", KEY, tmp_path, make)

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    for module, name in ((os, "utime"), (os, "rename"), (cache.tempfile, "mkdtemp")):
        monkeypatch.setattr(module, name, refuse)
    found = cache.load_or_make("toy", KEY, tmp_path, must_not_make)
    assert fingerprint(found) == fingerprint(make())
    with pytest.warns(UserWarning, match="could not cache toy .*read-only"):
        cache.load_or_make("toy", OTHER_KEY, tmp_path, make)


def test_many_at_once_make_one_entry(tmp_path):
    barrier = threading.Barrier(4)
    found = []

    def load():
        def make_together():
            barrier.wait()
            return make()

        found.append(fingerprint(cache.load_or_make("toy", KEY, tmp_path, make_together)))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [fingerprint(make())] * 4
    assert [path.name for path in (tmp_path / "decoded").iterdir()] == [KEY]


def test_the_longest_unused_entries_go_when_the_cache_is_full(tmp_path, monkeypatch):
    keys = [digit * 32 for digit in "0123"]
    for key in keys[:3]:
        cache.load_or_make("toy", key, tmp_path, make)
    size = sum(file.stat().st_size for file in entry(tmp_path, keys[0]).iterdir())
    for age, key in enumerate((keys[1], keys[2], keys[0])):
        os.utime(entry(tmp_path, key), (1e9 + age, 1e9 + age))
    cache.load_or_make("toy", keys[1], tmp_path, must_not_make)  # now the latest used
    bystander = tmp_path / "decoded" / "somebody's notes"
    bystander.mkdir()
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 2 * size)
    cache.load_or_make("toy", keys[3], tmp_path, make)
    left = {path.name for path in (tmp_path / "decoded").iterdir()}
    assert left == {keys[1], keys[3], bystander.name}


def test_what_is_larger_than_the_whole_cache_is_still_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 0)
    cache.load_or_make("toy", KEY, tmp_path, make)
    cache.load_or_make("toy", KEY, tmp_path, must_not_make)


def test_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    (tmp_path / "decoded").mkdir()
    dead, living = (tmp_path / f"decoded/.{OTHER_KEY}-{name}" for name in ("dead", "living"))
    for folder in (dead, living):
        folder.mkdir()
        (folder / "train_input.npy").write_bytes(bytes(10))
    os.utime(dead, (1e9, 1e9))
    cache.load_or_make("toy", KEY, tmp_path, make)
    assert (dead.exists(), living.exists()) == (False, True)
