"""Folders and tars of images: layout, decoding, hostile files, and the cache."""

import io
import os
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import datasets
from experiments.datasets import images as images_module
from tests.experiments.datasets.data_files import (
    FUZZ,
    mutations,
    result_or_error,
    some_images,
    tar_bytes,
)


def encode(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


def pixels(seed: int, *shape: int) -> np.ndarray:
    return some_images(seed, 1, *shape)[0]


def make_files(*shape: int) -> dict[str, bytes]:
    """Two classes; three training and one test image of each, their content given by `number`."""
    return {
        f"{split}/{class_name}/{number:04}.png": encode(pixels(number, *shape))
        for split, numbers in {"train": (0, 1, 2), "test": (3,)}.items()
        for class_name in ("zebra", "ant")
        for number in numbers
    }


def write_folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path, files, mode="w:xz"):
    path.write_bytes(tar_bytes(files, mode=mode))
    return path


@pytest.fixture
def load(tmp_path):
    return lambda path: datasets.load(path, cache_dir=tmp_path / "cache")


def test_a_folder_gives_its_images_with_alphabetical_labels(tmp_path, load):
    dataset = load(write_folder(tmp_path / "animals", make_files(5, 4, 3)))
    assert dataset.name == "animals"
    assert dataset.class_names == ("ant", "zebra")
    assert dataset.num_classes == 2
    assert dataset.image_shape == (5, 4, 3)
    expected = np.stack([pixels(number, 5, 4, 3) for number in (0, 1, 2, 0, 1, 2)])
    np.testing.assert_array_equal(dataset.train["image"], expected)
    np.testing.assert_array_equal(dataset.train["label"], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dataset.test["label"], [0, 1])
    assert dataset.train["label"].dtype == np.int32


def test_a_tar_gives_the_same_data_as_the_folder(tmp_path, load):
    files = dict(sorted(make_files(5, 4, 3).items()))
    folder = load(write_folder(tmp_path / "animals", files))
    leading = {f"./some/where/{name}": content for name, content in files.items()}
    archive = load(write_tar(tmp_path / "animals.tar.xz", leading))
    assert archive.name == "animals"
    assert datasets.fingerprint(archive) == datasets.fingerprint(folder)


def test_grey_images_have_one_channel_and_mixed_ones_three(tmp_path, load):
    files = make_files(5, 4)
    grey = load(write_folder(tmp_path / "grey", files))
    assert grey.image_shape == (5, 4, 1)
    np.testing.assert_array_equal(grey.train["image"][1, :, :, 0], pixels(1, 5, 4))
    files["train/zebra/colour.jpg"] = encode(pixels(9, 5, 4, 3), "JPEG")
    mixed = load(write_folder(tmp_path / "mixed", files))
    assert mixed.image_shape == (5, 4, 3)
    np.testing.assert_array_equal(
        mixed.train["image"][1], np.repeat(pixels(1, 5, 4)[:, :, None], 3, axis=2)
    )


def test_hidden_files_and_files_above_the_classes_are_ignored(tmp_path, load):
    files = make_files(5, 4)
    extra = {"README.md": b"hello", "train/notes.txt": b"hello", "train/ant/.DS_Store": b"\0"}
    path = write_tar(tmp_path / "a.tar", files | extra, mode="w")
    assert len(load(path).train["image"]) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train/ant/0001.png": b"not an image"}, "train/ant/0001.png: not a readable image"),
        ({"train/ant/0001.png": encode(pixels(0, 30, 30))[:-40]}, "not a readable image"),
        ({"train/ant/0001.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "not a readable image"),
        ({"train/ant/0001.png": encode(pixels(0, 4, 5))}, r"\(4, 5\) pixels, but .* \(5, 4\)"),
        ({"val/ant/0001.png": encode(pixels(0, 5, 4))}, "'val' is not a split"),
        ({"test/bee/0001.png": encode(pixels(0, 5, 4))}, r"test classes \['bee'\] have no train"),
    ],
)
def test_bad_files_and_layouts_are_refused_by_name(tmp_path, load, change, message):
    path = write_folder(tmp_path / "animals", make_files(5, 4) | change)
    with pytest.raises(ValueError, match=message):
        load(path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(tmp_path, load, split):
    files = {name: content for name, content in make_files(5, 4).items() if split not in name}
    path = write_tar(tmp_path / "animals.tar", files, mode="w")
    with pytest.raises(ValueError, match=f"no images in the {split} split: lay the images out"):
        load(path)


def test_a_file_that_is_no_archive_is_refused(tmp_path, load):
    path = tmp_path / "notes.txt"
    path.write_text("hello " * 200)
    with pytest.raises(ValueError, match=r"notes\.txt: damaged, unsafe or not a tar archive"):
        load(path)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path, load):
    content = encode(np.full((5, 4), 40_000, np.uint16))
    path = write_folder(tmp_path / "deep", make_files(5, 4) | {"train/ant/0000.png": content})
    with pytest.raises(ValueError, match="do not fit into 8 bits"):
        load(path)


def test_an_image_that_claims_gigapixels_is_refused_before_decoding(tmp_path, load):
    header = (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")):
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        png += len(body).to_bytes(4, "big") + kind + body + crc
    path = write_folder(tmp_path / "bomb", make_files(5, 4) | {"train/ant/0000.png": png})
    with pytest.raises(ValueError, match=r"0000\.png: not a readable image"):
        load(path)


@FUZZ
@given(st.data())
def test_a_mutated_image_decodes_to_its_size_or_raises_value_error(data):
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "PPM"]))
    content = data.draw(mutations(encode(pixels(0, 5, 4, 3), file_format)))
    result = result_or_error(images_module._decode, content, "fuzzed")
    if isinstance(result, ValueError):
        assert "fuzzed: not a readable image" in str(result)
    else:
        assert result.dtype == np.uint8
        assert result.shape[2] in (1, 3)


def test_a_second_load_decodes_nothing(tmp_path, load, monkeypatch):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    first = load(path)
    monkeypatch.setattr(images_module, "_decode", None)
    second = load(path)
    assert datasets.fingerprint(second) == datasets.fingerprint(first)
    assert not second.train["image"].flags.writeable


def test_a_changed_file_is_decoded_again(tmp_path, load):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    before = load(path)
    changed = path / "train/ant/0000.png"
    changed.write_bytes(encode(pixels(77, 5, 4)))
    os.utime(changed, ns=(1, 1))
    after = load(path)
    np.testing.assert_array_equal(after.train["image"][0, :, :, 0], pixels(77, 5, 4))
    assert datasets.fingerprint(after) != datasets.fingerprint(before)


def test_a_damaged_cache_is_named_with_the_remedy(tmp_path, load):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    load(path)
    (file,) = (tmp_path / "cache").glob("*/train_image.npy")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"damaged cache .*: delete this folder"):
        load(path)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not cache"):
        dataset = datasets.load(path, cache_dir=tmp_path / "file")
    assert len(dataset.train["image"]) == 6


def test_a_write_that_fails_leaves_no_cache_behind(tmp_path, load, monkeypatch):
    path = write_folder(tmp_path / "animals", make_files(5, 4))

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        with pytest.warns(UserWarning, match="disk full"):
            load(path)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(path).train["image"]) == 6
