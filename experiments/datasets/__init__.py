"""Data sets by name or path: uint8 images or text, and int32 labels, checked."""

import os
from pathlib import Path

import pooch

from experiments.datasets import canonical, text
from experiments.datasets.dataset import Dataset, fingerprint
from experiments.datasets.images import load_images

__all__ = ["NAMES", "Dataset", "fingerprint", "load"]

_LOADERS = {
    "digits": canonical.load_digits,
    "digits_noisy": canonical.load_digits_noisy,
    "mnist": canonical.load_mnist,
    "cifar10": canonical.load_cifar10,
    "cifar100": canonical.load_cifar100,
    "svhn": canonical.load_svhn,
    "python": text.load_python,
}
NAMES = tuple(_LOADERS)
"""Names that `load` knows; `digits_noisy` is `digits` with 20 % of the training labels wrong, and
`python` the source of the standard library."""


def load(
    name_or_path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set.

    Args:
      name_or_path: One of `NAMES`, a file of text, or a folder or tar of images laid out
        split/class/file; paths may also be relative to the data folder.
      data_dir: Folder with the files of named data sets, in a subfolder of the data set's name;
        by default the environment variable CABS_JAX_DATA. What is not there is downloaded.
      cache_dir: Folder for downloads and decoded images; by default the user's cache folder.

    Raises:
      ValueError: If the name is unknown or a file is damaged, unsafe or not what it should be.
      OSError: If a file cannot be found, downloaded or read.
    """
    data_dir = data_dir or os.environ.get("CABS_JAX_DATA") or None
    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
        if not data_dir.is_dir():
            raise NotADirectoryError(f"the data folder {data_dir} does not exist.")
    cache_dir = Path(cache_dir or pooch.os_cache("cabs_jax")).expanduser()
    if name_or_path in _LOADERS:
        return _LOADERS[name_or_path](data_dir, cache_dir)
    path = Path(name_or_path).expanduser()
    if data_dir is not None and not path.exists():
        path = data_dir / path
    if not os.fspath(name_or_path) or not path.exists():
        raise ValueError(
            f"unknown data set {os.fspath(name_or_path)!r}: choose one of {', '.join(NAMES)}, or "
            "pass the path of a folder or tar of images laid out split/class/file, or of a text."
        )
    if path.is_file() and path.suffix in text.SUFFIXES:
        return text.load_text(path)
    return load_images(path, cache_dir)
