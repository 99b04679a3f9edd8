"""Tiny data sets in the place of the published ones, and nothing found by chance."""

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import canonical
from experiments.datasets.canonical import RemoteFile
from tests.experiments.datasets.data_files import (
    cifar_bytes,
    idx_bytes,
    md5,
    publish_cifar,
    some_images,
    tar_bytes,
)


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("CABS_JAX_DATA", raising=False)


@pytest.fixture
def load(tmp_path):
    (tmp_path / "data").mkdir(exist_ok=True)
    return partial(datasets.load, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Publishes an MNIST of five and three examples; returns its uncompressed files by name."""
    contents = {
        "train-images-idx3-ubyte": idx_bytes(some_images(0, 5, 28, 28)),
        "train-labels-idx1-ubyte": idx_bytes(np.array([5, 0, 4, 1, 9])),
        "t10k-images-idx3-ubyte": idx_bytes(some_images(1, 3, 28, 28)),
        "t10k-labels-idx1-ubyte": idx_bytes(np.array([7, 2, 1])),
    }
    files = [
        file._replace(
            remote=RemoteFile(
                f"http://127.0.0.1:9/{name}.gz", md5(gzip.compress(content, mtime=0))
            ),
            content_checksum=md5(content),
        )
        for file, (name, content) in zip(canonical.MNIST, contents.items(), strict=True)
    ]
    monkeypatch.setattr(canonical, "MNIST", tuple(files))
    return contents


@pytest.fixture
def tiny_cifar10(monkeypatch):
    """Publishes a CIFAR-10 of two examples a file; returns the archive's files by name."""
    names = [*canonical.CIFAR10.train, *canonical.CIFAR10.test]
    contents = {
        f"cifar-10-batches-bin/{name}": cifar_bytes(
            some_images(seed, 2, 32, 32, 3), np.array([seed, 9])
        )
        for seed, name in enumerate(names)
    }
    contents["cifar-10-batches-bin/batches.meta.txt"] = b"airplane\n"
    archive = tar_bytes(contents, mode="w:gz")
    by_name = {Path(name).name: content for name, content in contents.items()}
    train, test = (
        {name: by_name[name] for name in names}
        for names in (canonical.CIFAR10.train, canonical.CIFAR10.test)
    )
    tiny = publish_cifar(canonical.CIFAR10, train, test, num_records=2)
    remote = canonical.CIFAR10.archive._replace(checksum=md5(archive))
    monkeypatch.setattr(canonical, "CIFAR10", tiny._replace(archive=remote))
    return contents, archive
