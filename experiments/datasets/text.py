"""Texts as sequences of bytes: the standard library of Python, or any file of text."""

import sysconfig
from pathlib import Path

import numpy as np

from experiments.datasets.archives import read_file
from experiments.datasets.dataset import Dataset, make_sequences

SUFFIXES = (".txt", ".text", ".c", ".py", ".md")
LENGTH = 128  # bytes that a sequence predicts
_TEST_SHARE = 0.05


def load_python(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The modules of the running Python's standard library, in the order of their paths.

    Another version of Python is another data set, as its fingerprint tells.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not left_out.intersection(path.relative_to(root).parts)
    )
    return _split("python", b"".join(path.read_bytes() for path in paths))


def load_text(path: Path) -> Dataset:
    """A file of text.

    Raises:
      ValueError: It is too short for sequences of either split.
      OSError: It cannot be read.
    """
    return _split(path.name, read_file(path))


def _split(name: str, text: bytes) -> Dataset:
    """Sequences of LENGTH bytes and the bytes that follow each; the last of them are for tests."""
    count = (len(text) - 1) // LENGTH
    held_out = int(count * _TEST_SHARE)
    if not held_out:
        raise ValueError(
            f"{name}: {len(text)} bytes are too short, at least {int(LENGTH / _TEST_SHARE) + 1} "
            "are needed."
        )
    codes = np.frombuffer(text, np.uint8)
    inputs = codes[: count * LENGTH].reshape(count, LENGTH)
    following = codes[1 : count * LENGTH + 1].reshape(count, LENGTH)
    train, test = slice(count - held_out), slice(count - held_out, count)
    return make_sequences(name, (inputs[train], following[train]), (inputs[test], following[test]))
