"""Writers of data files in exactly their canonical formats, and of damaged ones, for the tests."""

import hashlib
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.datasets.canonical import CifarFile

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def cifar_bytes(images: np.ndarray, *labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.column_stack([*labels, planes]).astype(np.uint8).tobytes()


def some_images(seed: int, n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def tar_bytes(files: dict[str, bytes], **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, **({"mode": "w"} | options)) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut short, or with a few bytes changed."""
    position = st.integers(0, len(content) - 1)

    def change(edits: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for where, value in edits:
            changed[where] = value
        return bytes(changed)

    edits = st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)
    return st.one_of(edits.map(change), position.map(lambda end: content[:end]))


def result_or_error(parser: Callable, *args):
    """What the parser returns, or the ValueError it raises; anything else it raises passes."""
    try:
        return parser(*args)
    except ValueError as error:
        return error


def md5(content: bytes) -> str:
    return "md5:" + hashlib.md5(content, usedforsecurity=False).hexdigest()


def publish_cifar(files, train: dict[str, bytes], test: dict[str, bytes], num_records: int):
    """CIFAR as if these were the contents of its files."""
    parts = (
        {name: CifarFile(num_records, md5(content)) for name, content in split.items()}
        for split in (train, test)
    )
    return files._replace(**dict(zip(("train", "test"), parts, strict=True)))


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def encode(image: np.ndarray, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format)
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
