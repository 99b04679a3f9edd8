"""Any folder or tar of images laid out split/class/file, decoded once and cached as arrays."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from experiments.datasets.archives import MAX_FILE_BYTES, read_tar
from experiments.datasets.dataset import MAX_DATASET_BYTES, Dataset, make_dataset

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
_MAX_PIXELS = 1 << 24
_SPLITS = ("train", "test")
_LAYOUT = "lay the images out as train/CLASS/FILE and test/CLASS/FILE"


def load_images(path: Path, cache_dir: Path) -> Dataset:
    """Loads a folder or tar of images; from `cache_dir` if it has not changed since the last time.

    All images must have one size. They are grey (one channel) if all of them are, else RGB. Classes
    are numbered in the alphabetical order of their names. The cached arrays are memory-mapped,
    read-only: processes share them.

    Raises:
      ValueError: If the layout is another, a file is not an image, sizes differ, a test class has
        no training images, or the archive or cache is damaged.
    """
    name = path.name.split(".")[0]
    folder = cache_dir / f"{name}-{_cache_key(path)}"
    if not folder.is_dir():
        dataset = _decode_all(path, name)
        try:
            _write_cache(folder, dataset)
        except OSError as error:
            warnings.warn(
                f"could not cache {path} in {cache_dir}, it is decoded again next time: {error}",
                stacklevel=2,
            )
            return dataset
    return _read_cache(folder, name)


def _decode_all(path: Path, name: str) -> Dataset:
    images: dict[str, list[np.ndarray]] = {split: [] for split in _SPLITS}
    classes: dict[str, list[str]] = {split: [] for split in _SPLITS}
    size: tuple[int, ...] = ()
    total = 0
    for file, data in _folder_files(path) if path.is_dir() else read_tar(path):
        parts = PurePosixPath(file).parts[-3:]
        if len(parts) < 3 or parts[-1].startswith("."):
            continue
        split, class_name, _ = parts
        where = f"{path}: {file}"
        if split not in _SPLITS:
            raise ValueError(f"{where}: {split!r} is not a split: {_LAYOUT}")
        image = _decode(data, where)
        size = size or image.shape[:2]
        if image.shape[:2] != size:
            raise ValueError(
                f"{where}: {image.shape[:2]} pixels, but the images before it have {size}: "
                "resize all images to one size first"
            )
        total += image.nbytes
        if total > MAX_DATASET_BYTES:
            raise ValueError(f"{path}: more than {MAX_DATASET_BYTES:,} bytes of pixels")
        images[split].append(image)
        classes[split].append(class_name)
    for split in _SPLITS:
        if not images[split]:
            raise ValueError(f"{path}: no images in the {split} split: {_LAYOUT}")
    class_names = tuple(sorted(set(classes["train"])))
    if unseen := sorted(set(classes["test"]) - set(class_names)):
        raise ValueError(f"{path}: test classes {unseen} have no training images")
    index = {class_name: label for label, class_name in enumerate(class_names)}
    channels = max(image.shape[2] for split in _SPLITS for image in images[split])

    def stack(split: str) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(images[split]), *size, channels)
        pixels = np.empty(shape, np.uint8)
        for row, image in zip(pixels, images[split], strict=True):
            row[:] = image  # a grey image among coloured ones is broadcast to three channels
        return pixels, np.array([index[class_name] for class_name in classes[split]])

    return make_dataset(name, stack("train"), stack("test"), class_names)


def _decode(data: bytes, where: str) -> np.ndarray:
    """uint8 (height, width, 1 or 3) pixels of an encoded image."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode in _GREY_MODES:
                return np.asarray(image.convert("L"))[:, :, None]
            if image.mode in _COLOUR_MODES:
                return np.asarray(image.convert("RGB"))
            raise ValueError(f"pixels of mode {image.mode!r} do not fit into 8 bits")
    except Exception as error:  # Pillow answers damaged files with whatever its decoder trips over
        raise ValueError(f"{where}: not a readable image: {error}") from error


def _folder_files(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in _list_folder(path):
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{file}: larger than {MAX_FILE_BYTES:,} bytes")
        yield file.relative_to(path).as_posix(), file.read_bytes()


def _list_folder(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*/*/*") if file.is_file())


def _cache_key(path: Path) -> str:
    """Changes with the place, size or modification time of the archive or of any file inside."""
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8)
    for file in _list_folder(path) if path.is_dir() else [path]:
        stat = file.stat()
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _write_cache(folder: Path, dataset: Dataset) -> None:
    """Writes beside the final place and renames, so that the folder is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for split in _SPLITS:
            for key, array in getattr(dataset, split).items():
                np.save(temporary / f"{split}_{key}.npy", array, allow_pickle=False)
        (temporary / "class_names.json").write_text(json.dumps(dataset.class_names))
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process may have put the same arrays there first.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_cache(folder: Path, name: str) -> Dataset:
    try:
        train, test = (
            tuple(
                np.load(folder / f"{split}_{key}.npy", mmap_mode="r", allow_pickle=False)
                for key in ("image", "label")
            )
            for split in _SPLITS
        )
        class_names = tuple(json.loads((folder / "class_names.json").read_text()))
        return make_dataset(name, train, test, class_names)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: damaged cache ({error}): delete this folder") from error
