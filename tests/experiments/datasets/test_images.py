"""Folders and tars of images: layout, decoding, hostile files, and what is decoded again."""

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import datasets
from experiments.datasets import images as images_module
from experiments.datasets.images import _Example
from tests.experiments.datasets.data_files import (
    FUZZ,
    encode,
    make_files,
    mutations,
    pixels,
    result_or_error,
    write_folder,
    write_tar,
)


@pytest.fixture
def load(tmp_path):
    return lambda path: datasets.load(path, cache_dir=tmp_path / "cache")


def test_a_folder_gives_its_images_with_alphabetical_labels(tmp_path, load):
    dataset = load(write_folder(tmp_path / "animals", make_files(5, 4, 3)))
    assert dataset.name == "animals"
    assert dataset.class_names == ("ant", "zebra")
    assert dataset.num_classes == 2
    assert dataset.input_shape == (5, 4, 3)
    expected = np.stack([pixels(number, 5, 4, 3) for number in (0, 1, 2, 0, 1, 2)])
    np.testing.assert_array_equal(dataset.train["input"], expected)
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
    assert grey.input_shape == (5, 4, 1)
    np.testing.assert_array_equal(grey.train["input"][1, :, :, 0], pixels(1, 5, 4))
    files["train/zebra/colour.jpg"] = encode(pixels(9, 5, 4, 3), "JPEG")
    mixed = load(write_folder(tmp_path / "mixed", files))
    assert mixed.input_shape == (5, 4, 3)
    np.testing.assert_array_equal(
        mixed.train["input"][1], np.repeat(pixels(1, 5, 4)[:, :, None], 3, axis=2)
    )


def test_hidden_files_and_files_above_the_classes_are_ignored(tmp_path, load):
    files = make_files(5, 4)
    extra = {"README.md": b"hello", "train/notes.tar": b"hello", "train/ant/.DS_Store": b"\0"}
    path = write_tar(tmp_path / "a.tar", files | extra, mode="w")
    assert len(load(path).train["input"]) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train/ant/0001.png": b"not an image"}, "train/ant/0001.png': not a readable image"),
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
    path = tmp_path / "notes.tar"
    path.write_text("hello " * 200)
    with pytest.raises(ValueError, match=r"notes\.tar: damaged, unsafe or not a tar archive"):
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
    with pytest.raises(ValueError, match=r"0000\.png': not a readable image"):
        load(path)


@FUZZ
@given(st.data())
def test_a_mutated_image_decodes_to_its_size_or_raises_value_error(data):
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "PPM"]))
    content = data.draw(mutations(encode(pixels(0, 5, 4, 3), file_format)))

    def decode():
        with images_module._open_image(_Example("train", "cat", "fuzzed", content)) as image:
            return images_module._to_array(image)

    result = result_or_error(decode)
    if isinstance(result, ValueError):
        assert "fuzzed: not a readable image" in str(result)
    else:
        assert result.dtype == np.uint8
        assert result.shape[2] in (1, 3)


@pytest.mark.parametrize("hidden", ["train/.ipynb_checkpoints/1.png", ".cache/ant/1.png"])
@pytest.mark.parametrize("tar", [False, True])
def test_folders_whose_name_starts_with_a_dot_are_no_classes(tmp_path, load, hidden, tar):
    files = make_files(5, 4) | {hidden: b"not an image"}
    if tar:
        dataset = load(write_tar(tmp_path / "animals.tar", files, mode="w"))
    else:
        dataset = load(write_folder(tmp_path / "animals", files))
    assert dataset.class_names == ("ant", "zebra")
    assert len(dataset.train["input"]) == 6


def encode_rotated(upright: np.ndarray, orientation: int, file_format: str) -> bytes:
    """The image stored as a camera held sideways stores it."""
    stored = {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright), 8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    image.save(
        stream, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {})
    )
    return stream.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_rotated_as_their_exif_data_ask(tmp_path, load, orientation, file_format):
    files = make_files(5, 4, 3)
    files["train/ant/0000.png"] = encode_rotated(pixels(0, 5, 4, 3), orientation, file_format)
    dataset = load(write_folder(tmp_path / "animals", files))
    np.testing.assert_array_equal(dataset.train["input"][0], pixels(0, 5, 4, 3))


def test_a_tar_of_large_images_takes_no_more_memory_than_is_kept(tmp_path):
    side, number = 512, 12
    image = encode(np.zeros((side, side, 3), np.uint8))
    files = {f"{split}/ant/{i}.png": image for split in ("train", "test") for i in range(number)}
    path = write_tar(tmp_path / "large.tar", files, mode="w:gz")
    kept = 2 * number * side * side * 3
    assert path.stat().st_size < kept / 200
    dataset = images_module._decode_all(path, "warm-up of lazy imports")
    del dataset
    tracemalloc.start()
    dataset = images_module._decode_all(path, "large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(split["input"].nbytes for split in (dataset.train, dataset.test)) == kept
    assert peak < 1.25 * kept


def test_too_many_pixels_are_refused_before_any_is_decoded(tmp_path, load, monkeypatch):
    path = write_tar(tmp_path / "bomb.tar", make_files(50, 40))
    monkeypatch.setattr(images_module, "MAX_DATASET_BYTES", 8 * 50 * 40 - 1)
    monkeypatch.setattr(images_module, "_to_array", None)
    with pytest.raises(ValueError, match=r"bomb\.tar: more than 15,999 bytes of pixels"):
        load(path)


def save(image: Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_animated_images_are_refused(tmp_path, load, file_format):
    frames = [Image.fromarray(pixels(i, 5, 4, 3)) for i in range(3)]
    content = save(frames[0], file_format, save_all=True, append_images=frames[1:])
    path = write_folder(tmp_path / "a", make_files(5, 4, 3) | {"train/ant/0001.png": content})
    with pytest.raises(ValueError, match="animated: an example is one image"):
        load(path)


def test_colours_of_sixteen_bits_are_refused_as_greys_are(tmp_path, load):
    header = struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(4 * 6) for _ in range(5)))
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        png += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    path = write_folder(tmp_path / "deep", make_files(5, 4, 3) | {"train/ant/0001.png": png})
    with pytest.raises(ValueError, match="do not fit into 8 bits"):
        load(path)


@pytest.mark.parametrize("kind", [b"P6", b"P3"])
def test_colours_of_a_ppm_are_refused_above_eight_bits_alone(tmp_path, load, kind):
    def ppm(largest):
        numbers = np.arange(60) * (largest // 64)
        rows = numbers.astype(">u2" if largest > 255 else "u1").tobytes()
        if kind == b"P3":
            rows = b" ".join(b"%d" % number for number in numbers)
        return b"%s 4 5 %d\n%s" % (kind, largest, rows)

    files = dict.fromkeys(("train/a/0.ppm", "test/a/0.ppm"), ppm(255))
    expected = 3 * np.arange(60, dtype=np.uint8).reshape(1, 5, 4, 3)
    np.testing.assert_array_equal(
        load(write_folder(tmp_path / "8", files)).train["input"], expected
    )
    path = write_folder(tmp_path / "16", files | {"test/a/1.ppm": ppm(65535)})
    with pytest.raises(ValueError, match="do not fit into 8 bits"):
        load(path)


@pytest.mark.parametrize("pipe", [True, False])
def test_what_may_be_endless_is_no_data_set(tmp_path, load, pipe):
    path = tmp_path / "pipe" if pipe else Path(os.devnull)
    if pipe:
        os.mkfifo(path)
    with pytest.raises(ValueError, match="a device or pipe, which may be endless"):
        load(path)


def test_palettes_become_their_colours_and_transparency_is_dropped(tmp_path, load):
    indices = np.arange(20, dtype=np.uint8).reshape(5, 4)
    palette = pixels(3, 20, 3)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    files = make_files(5, 4, 3)
    files["train/ant/0000.png"] = save(image, "PNG")
    files["train/ant/0001.png"] = save(image, "PNG", transparency=bytes(range(20)))
    files["train/ant/0002.png"] = save(image.convert("RGBA"), "PNG")
    dataset = load(write_folder(tmp_path / "palette", files))
    for decoded in dataset.train["input"][:3]:
        np.testing.assert_array_equal(decoded, palette[indices])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train/ant/more/1.png", r"'.*train/ant/more': a folder, broken link or device"),
        ("train/ant/nowhere.png", r"nowhere\.png': a folder, broken link or device"),
        ("train/nowhere", r"nowhere': a folder, broken link or device"),
    ],
)
def test_what_a_folder_would_leave_out_unnoticed_is_refused(tmp_path, load, extra, message):
    path = write_folder(tmp_path / "animals", make_files(5, 4))
    if "nowhere" in extra:
        (path / extra).symlink_to(tmp_path / "absent")
    else:
        write_folder(path, {extra: encode(pixels(0, 5, 4))})
    with pytest.raises(ValueError, match=message):
        load(path)


def test_an_archive_that_holds_a_file_twice_or_two_data_sets_is_refused(tmp_path, load):
    files = make_files(5, 4)
    path = write_tar(tmp_path / "two.tar", files | {f"copy/{name}": files[name] for name in files})
    with pytest.raises(ValueError, match=r"'copy/.*': the images before it are in another folder"):
        load(path)
    twice = files | {f"./{name}": files[name] for name in list(files)[:1]}
    with pytest.raises(ValueError, match=r"0000\.png': the archive holds this file twice"):
        load(write_tar(tmp_path / "twice.tar", twice))


def test_names_of_any_characters_load_and_are_printable_in_errors(tmp_path, load):
    names = {"zebra": "z\n\x1b[31m", "ant": os.fsdecode(b"\xe4\xff")}
    files = {}
    for name, content in make_files(5, 4).items():
        split, class_name, file = name.split("/")
        files[f"{split}/{names[class_name]}/ü\n{file}"] = content
    root = write_folder(tmp_path / ("." + "n" * 200), files)
    dataset = load(root)
    assert dataset.class_names == tuple(sorted(names.values()))
    assert datasets.fingerprint(load(root)) == datasets.fingerprint(dataset)
    write_folder(root, {next(iter(files)): b"not an image"})
    with pytest.raises(ValueError, match="not a readable image") as info:
        load(root)
    assert str(info.value).isprintable()


def test_an_empty_name_is_not_the_current_folder(tmp_path, load, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path / "animals", make_files(5, 4)))
    assert load(".").name == "animals"
    with pytest.raises(ValueError, match="unknown data set ''"):
        load("")
