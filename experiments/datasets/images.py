"""Any folder or tar of images laid out split/class/file, decoded once and cached as arrays."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, PpmImagePlugin

from experiments.datasets import cache
from experiments.datasets.archives import MAX_FILE_BYTES, read_tar
from experiments.datasets.dataset import MAX_DATASET_BYTES, Dataset, make_dataset

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_MAX_PIXELS = 1 << 24
_SPLITS = ("train", "test")
_LAYOUT = "lay the images out as train/CLASS/FILE and test/CLASS/FILE"
_DECODING = f"decoded by version 2 of this module and Pillow {PIL.__version__}"


class _Example(NamedTuple):
    """An encoded image, and where it was found, for errors."""

    split: str
    class_name: str
    where: str
    data: bytes


class _Headers(NamedTuple):
    """What the headers of all images say: labels of each split, class names, shape of an image."""

    labels: dict[str, list[int]]
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]


def load_images(path: Path, cache_dir: Path) -> Dataset:
    """Loads a folder or tar of images; from `cache_dir` if its content was decoded before.

    All images must have one size, after the rotation that their EXIF data ask for. They are grey
    (one channel) if all of them are, else RGB; transparency is dropped. Classes are numbered in the
    alphabetical order of their names. Files and folders whose name starts with a dot are left out.
    What is cached is memory-mapped, read-only: processes share it.

    Raises:
      ValueError: If the layout is another, a file is no still 8-bit image, sizes differ, a test
        class has no training images, the archive is damaged or holds a file twice, there are more
        than 8 GiB of pixels, or the files change meanwhile.
    """
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path}: a device or pipe, which may be endless: {_LAYOUT}.")
    name = Path(os.path.abspath(path)).name.lstrip(".").split(".")[0] or "images"
    key = _content_key(path)

    def decode() -> Dataset:
        dataset = _decode_all(path, name)
        if _content_key(path) != key:
            raise _changed(path)
        return dataset

    return cache.load_or_make(name, key, cache_dir, decode)


def _content_key(path: Path) -> str:
    """Hash of the archive, or of each file's name within the folder and content."""
    digest = hashlib.blake2b(_DECODING.encode(), digest_size=cache.KEY_LENGTH // 2)
    if path.is_dir():
        for name, data in _read_files(path):
            digest.update(os.fsencode(name) + b"\0" + hashlib.blake2b(data).digest())
    else:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
    return digest.hexdigest()


def _decode_all(path: Path, name: str) -> Dataset:
    """Decodes one image after the other into arrays whose size the headers have told."""
    labels, class_names, shape = _read_headers(path)
    pixels = {split: np.empty((len(labels[split]), *shape), np.uint8) for split in _SPLITS}
    rows = {split: iter(pixels[split]) for split in _SPLITS}
    for example in _read_examples(path):
        row = next(rows[example.split], None)
        with _open_image(example) as image:
            decoded = _to_array(image)
        if row is None or decoded.shape[:2] != shape[:2] or decoded.shape[2] > shape[2]:
            raise _changed(path)
        row[:] = decoded  # a grey image among coloured ones is broadcast to three channels
    train, test = ((pixels[split], np.array(labels[split])) for split in _SPLITS)
    return make_dataset(name, train, test, class_names)


def _read_headers(path: Path) -> _Headers:
    """Checks all that can be known before memory is taken for the pixels."""
    classes: dict[str, list[str]] = {split: [] for split in _SPLITS}
    size: tuple[int, ...] = ()
    channels = 1
    for example in _read_examples(path):
        with _open_image(example) as image:
            image_size, image_channels = _size(image), 1 if image.mode in _GREY_MODES else 3
        size = size or image_size
        if image_size != size:
            raise ValueError(
                f"{example.where}: {image_size} pixels, but the images before it have {size}: "
                "resize all images to one size first."
            )
        channels = max(channels, image_channels)
        classes[example.split].append(example.class_name)
        num_images = sum(map(len, classes.values()))
        if num_images * size[0] * size[1] * channels > MAX_DATASET_BYTES:
            raise ValueError(f"{path}: more than {MAX_DATASET_BYTES:,} bytes of pixels.")
    for split in _SPLITS:
        if not classes[split]:
            raise ValueError(f"{path}: no images in the {split} split: {_LAYOUT}.")
    class_names = tuple(sorted(set(classes["train"])))
    if unseen := sorted(set(classes["test"]) - set(class_names)):
        raise ValueError(f"{path}: test classes {unseen} have no training images.")
    index = {class_name: label for label, class_name in enumerate(class_names)}
    labels = {split: [index[class_name] for class_name in classes[split]] for split in _SPLITS}
    return _Headers(labels, class_names, (size[0], size[1], channels))


def _read_examples(path: Path) -> Iterator[_Example]:
    """Yields the images of all classes, in the order of the archive or of their names."""
    root: tuple[str, ...] | None = None
    seen = set()
    for name, data in _read_files(path):
        parts = PurePosixPath(name).parts
        if len(parts) < 3 or any(part.startswith(".") for part in parts):
            continue
        *above, split, class_name, _ = parts
        where = f"{path}: {name!r}"
        if split not in _SPLITS:
            raise ValueError(f"{where}: {split!r} is not a split: {_LAYOUT}.")
        root = tuple(above) if root is None else root
        if root != tuple(above):
            raise ValueError(f"{where}: the images before it are in another folder: {_LAYOUT}.")
        if name in seen:
            raise ValueError(f"{where}: the archive holds this file twice.")
        seen.add(name)
        yield _Example(split, class_name, where, data)


def _read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the name, within `path`, and content of each file of the archive or folder."""
    if not path.is_dir():
        yield from read_tar(path)
        return
    for file in _list_folder(path):
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{str(file)!r}: larger than {MAX_FILE_BYTES:,} bytes.")
        yield file.relative_to(path).as_posix(), file.read_bytes()


def _list_folder(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Yields the files two folders down; raises on what would be left out unnoticed."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if depth < 2 and entry.is_dir():
            yield from _list_folder(entry, depth + 1)
        elif not entry.is_file():
            raise ValueError(f"{str(entry)!r}: a folder, broken link or device: {_LAYOUT}.")
        elif depth == 2:
            yield entry


@contextlib.contextmanager
def _open_image(example: _Example) -> Iterator[Image.Image]:
    """Opens a still image of 8 bits; whatever fails until it is closed becomes a ValueError."""
    try:
        with Image.open(io.BytesIO(example.data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode not in _GREY_MODES + _COLOUR_MODES or _has_16_bits(image):
                raise ValueError(f"pixels of mode {image.mode!r} do not fit into 8 bits")
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError("animated: an example is one image")
            yield image
    except Exception as error:  # Pillow answers damaged files with whatever its decoder trips over
        raise ValueError(f"{example.where}: not a readable image: {error}.") from error


def _has_16_bits(image: Image.Image) -> bool:
    """Whether Pillow would keep only the upper half of 16-bit colours, as of PNG's and PPM's."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        return any(str(raw_mode).endswith(";16B") for _, _, _, raw_mode in image.tile)
    return isinstance(image, PpmImagePlugin.PpmImageFile) and any(
        isinstance(arguments, tuple) and arguments[-1] > 255 for _, _, _, arguments in image.tile
    )


def _size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the image once it is rotated."""
    if image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS:
        return image.width, image.height
    return image.height, image.width


def _to_array(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 1 or 3) pixels of the rotated image."""
    rotated = ImageOps.exif_transpose(image)
    if rotated.mode in _GREY_MODES:
        return np.asarray(rotated.convert("L"))[:, :, None]
    if "transparency" in rotated.info:
        rotated = rotated.convert("RGBA")  # a palette's must be told before it can be dropped
    return np.asarray(rotated.convert("RGB"))


def _changed(path: Path) -> ValueError:
    return ValueError(f"{path}: changed while it was read: try again once it is complete.")
