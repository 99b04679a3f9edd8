"""Images are decoded again when, and only when, what they are or where they lie has changed."""

import os

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import images as images_module
from tests.experiments.datasets.data_files import (
    encode,
    make_files,
    pixels,
    some_images,
    write_folder,
)


@pytest.fixture
def load(tmp_path):
    return lambda path: datasets.load(path, cache_dir=tmp_path / "cache")


def test_a_second_load_decodes_nothing(tmp_path, load, monkeypatch):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    first = load(path)
    monkeypatch.setattr(images_module, "_open_image", None)
    second = load(path)
    assert datasets.fingerprint(second) == datasets.fingerprint(first)
    assert not second.train["input"].flags.writeable


def test_a_changed_file_is_decoded_again(tmp_path, load):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    before = load(path)
    changed = path / "train/ant/0000.png"
    changed.write_bytes(encode(pixels(77, 5, 4)))
    os.utime(changed, ns=(1, 1))
    after = load(path)
    np.testing.assert_array_equal(after.train["input"][0, :, :, 0], pixels(77, 5, 4))
    assert datasets.fingerprint(after) != datasets.fingerprint(before)


def move_an_image(root):
    (root / "train/ant/2.bmp").rename(root / "train/zebra/2.bmp")


def rename_a_class(root):
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "bee")


def swap_the_splits(root):
    (root / "train").rename(root / "other")
    (root / "test").rename(root / "train")
    (root / "other").rename(root / "test")


def swap_two_images(root):
    first, second = (root / f"train/{name}.bmp" for name in ("ant/1", "zebra/4"))
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


@pytest.mark.parametrize(
    "change", [move_an_image, rename_a_class, swap_the_splits, swap_two_images]
)
def test_what_moves_is_decoded_again(tmp_path, load, change):
    """However much the files are alike: the same sizes, times and, in order, names."""
    names = ["ant/0", "ant/1", "ant/2", "zebra/3", "zebra/4", "zebra/5"]
    root = tmp_path / "animals"
    for seed, split in enumerate(("train", "test")):
        images = some_images(seed, len(names), 5, 4, 3)
        write_folder(
            root,
            {
                f"{split}/{name}.bmp": encode(image, "BMP")
                for name, image in zip(names, images, strict=True)
            },
        )

    def load_unpacked():
        for file in root.glob("*/*/*"):
            os.utime(file, (1e9, 1e9))  # as an archive has it
        return load(root)

    before = datasets.fingerprint(load_unpacked())
    change(root)
    after = datasets.fingerprint(load_unpacked())
    assert after != before
    assert after == datasets.fingerprint(datasets.load(root, cache_dir=tmp_path / "empty"))


def test_the_same_content_elsewhere_is_not_decoded_again(tmp_path, load, monkeypatch):
    first = load(write_folder(tmp_path / "animals", make_files(5, 4)))
    monkeypatch.setattr(images_module, "_open_image", None)
    second = load(write_folder(tmp_path / "copy", make_files(5, 4)))
    assert (first.name, second.name) == ("animals", "copy")
    assert datasets.fingerprint(first) == datasets.fingerprint(second)


def test_files_that_change_while_they_are_read_are_refused(tmp_path, load, monkeypatch):
    root = write_folder(tmp_path / "animals", make_files(5, 4))
    read_headers = images_module._read_headers

    def read_then_change(path, change):
        headers = read_headers(path)
        change()
        return headers

    for change in (
        lambda: (root / "train/ant/0000.png").write_bytes(encode(pixels(50, 5, 4))),
        lambda: (root / "train/ant/0000.png").write_bytes(encode(pixels(50, 6, 4))),
        lambda: (root / "train/ant/new.png").write_bytes(encode(pixels(50, 5, 4))),
        lambda: (root / "train/ant/new.png").unlink(),
    ):
        monkeypatch.setattr(
            images_module, "_read_headers", lambda path, c=change: read_then_change(path, c)
        )
        with pytest.raises(ValueError, match="animals: changed while it was read"):
            load(root)
        write_folder(root, make_files(5, 4))
