"""The named data sets: found, verified, downloaded, or explained."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from experiments import datasets
from experiments.datasets import canonical
from tests.experiments.datasets.data_files import (
    FUZZ,
    cifar_bytes,
    md5,
    mutations,
    publish_cifar,
    put,
    some_images,
)

DATA_DIR = os.environ.get("CABS_JAX_DATA")
"""Folder with real data, for the tests that need it."""


def test_digits_have_their_real_values_and_a_fixed_split():
    dataset = datasets.load("digits")
    assert dataset.input_shape == (8, 8, 1)
    assert (len(dataset.train["input"]), len(dataset.test["input"])) == (1437, 360)
    assert (dataset.train["input"].min(), dataset.train["input"].max()) == (0, 16)
    assert dataset.num_classes == 10
    assert np.bincount(dataset.test["label"]).min() >= 34
    assert datasets.fingerprint(dataset) == datasets.fingerprint(datasets.load("digits"))
    assert datasets.fingerprint(dataset) == "7428e9812f64bcfb555130a71c9aa9c3"


def test_noisy_digits_differ_from_the_digits_in_a_fifth_of_the_training_labels_alone():
    clean, noisy = datasets.load("digits"), datasets.load("digits_noisy")
    assert noisy.name == "digits_noisy"
    for split in ("train", "test"):
        np.testing.assert_array_equal(
            getattr(noisy, split)["input"], getattr(clean, split)["input"]
        )
    np.testing.assert_array_equal(noisy.test["label"], clean.test["label"])
    wrong = noisy.train["label"] != clean.train["label"]
    assert wrong.sum() == round(0.2 * 1437)
    shift = (noisy.train["label"] - clean.train["label"])[wrong] % 10
    # Each of the other nine labels is as likely: 287/9 = 32 of each, with a deviation of 5.3.
    assert np.abs(np.bincount(shift, minlength=10)[1:] - 287 / 9).max() < 3 * 5.3
    # Neither the place nor the digit decides which labels are wrong.
    assert abs(np.flatnonzero(wrong).mean() / 1437 - 0.5) < 3 * 0.29 / np.sqrt(287)
    assert np.bincount(clean.train["label"][wrong]).min() > 287 / 10 / 2


def test_noisy_digits_are_the_same_everywhere():
    noisy = datasets.load("digits_noisy")
    assert noisy.train["label"].dtype == np.int32
    assert datasets.fingerprint(noisy) == "af73efe493e3694c74dbec127bcc1fbf"
    assert datasets.fingerprint(datasets.load("digits")) == "7428e9812f64bcfb555130a71c9aa9c3"


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_loads_from_the_data_folder(load, tmp_path, tiny_mnist, compressed):
    for name, content in tiny_mnist.items():
        if compressed:
            put(tmp_path / f"data/mnist/{name}.gz", gzip.compress(content, 1))
        else:
            put(tmp_path / f"data/mnist/{name}", content)
    dataset = load("mnist")
    np.testing.assert_array_equal(dataset.train["input"][..., 0], some_images(0, 5, 28, 28))
    np.testing.assert_array_equal(dataset.test["label"], [7, 2, 1])
    for split in (dataset.train, dataset.test):
        assert split["input"].dtype == np.uint8
        assert split["label"].dtype == np.int32
        assert split["input"].flags.c_contiguous


def test_the_data_folder_may_come_from_the_environment(tmp_path, monkeypatch, tiny_mnist):
    for name, content in tiny_mnist.items():
        put(tmp_path / f"mnist/{name}", content)
    monkeypatch.setenv("CABS_JAX_DATA", str(tmp_path))
    assert len(datasets.load("mnist").train["input"]) == 5
    monkeypatch.setenv("CABS_JAX_DATA", str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError, match="absent does not exist"):
        datasets.load("mnist")


def test_swapped_mnist_files_are_refused(load, tmp_path, tiny_mnist):
    names = list(tiny_mnist)
    for name, other in zip(names, names[2:] + names[:2], strict=True):
        put(tmp_path / f"data/mnist/{name}", tiny_mnist[other])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: MD5 .* where the published"):
        load("mnist")


def test_cifar10_loads_from_its_archive_or_its_files(load, tmp_path, tiny_cifar10):
    contents, archive = tiny_cifar10
    put(tmp_path / "data/cifar10/cifar-10-binary.tar.gz", archive)
    from_archive = load("cifar10")
    np.testing.assert_array_equal(from_archive.train["label"], [0, 9, 1, 9, 2, 9, 3, 9, 4, 9])
    np.testing.assert_array_equal(from_archive.test["input"], some_images(5, 2, 32, 32, 3))
    (tmp_path / "data/cifar10/cifar-10-binary.tar.gz").unlink()
    for name, content in contents.items():
        put(tmp_path / "data/cifar10" / name, content)
    assert datasets.fingerprint(load("cifar10")) == datasets.fingerprint(from_archive)
    (tmp_path / "data/cifar10/cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar10 holds no data_batch_3\.bin"):
        load("cifar10")


def test_a_corrupted_cifar_archive_is_refused(load, tmp_path, tiny_cifar10):
    _, archive = tiny_cifar10
    put(tmp_path / "data/cifar10/cifar-10-binary.tar.gz", archive[:-100])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz: MD5"):
        load("cifar10")


def test_a_corrupted_cifar_file_found_unpacked_is_refused(load, tmp_path, tiny_cifar10):
    contents, _ = tiny_cifar10
    for name, content in contents.items():
        put(tmp_path / "data/cifar10" / name, content)
    changed = bytearray(contents["cifar-10-batches-bin/data_batch_3.bin"])
    changed[0] = 7  # another class, as legal as the right one
    put(tmp_path / "data/cifar10/cifar-10-batches-bin/data_batch_3.bin", bytes(changed))
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: MD5 .* where the published"):
        load("cifar10")


def test_swapped_cifar_batches_are_refused(load, tmp_path, tiny_cifar10):
    contents, _ = tiny_cifar10
    folder = "cifar-10-batches-bin"
    first, test = f"{folder}/data_batch_1.bin", f"{folder}/test_batch.bin"
    for name, content in (contents | {first: contents[test], test: contents[first]}).items():
        put(tmp_path / "data/cifar10" / name, content)
    with pytest.raises(ValueError, match=r"data_batch_1\.bin: MD5 .* where the published"):
        load("cifar10")


@pytest.mark.parametrize("files", [canonical.CIFAR10, canonical.CIFAR100])
def test_the_files_of_cifar_are_published_with_sha1(files):
    parts = files.train | files.test
    assert sum(part.num_records for part in parts.values()) == 60_000
    digests = {part.checksum.removeprefix("sha1:") for part in parts.values()}
    assert len(digests) == len(parts)
    assert all(len(bytes.fromhex(digest)) == 20 for digest in digests)


def publish_cifar100(tmp_path, monkeypatch, train: bytes, test: bytes) -> None:
    put(tmp_path / "data/cifar100/train.bin", train)
    put(tmp_path / "data/cifar100/test.bin", test)
    tiny = publish_cifar(canonical.CIFAR100, {"train.bin": train}, {"test.bin": test}, 3)
    monkeypatch.setattr(canonical, "CIFAR100", tiny)


def test_cifar100_has_a_hundred_classes(load, tmp_path, monkeypatch):
    images, coarse = some_images(0, 3, 32, 32, 3), np.array([19, 0, 1])
    train, test, wrong = (
        cifar_bytes(images, coarse, np.array(fine))
        for fine in ([99, 0, 42], [7, 8, 9], [7, 100, 9])
    )
    publish_cifar100(tmp_path, monkeypatch, train, wrong)
    with pytest.raises(ValueError, match=r"cifar100, test split: label 100 is outside \[0, 100\)"):
        load("cifar100")
    publish_cifar100(tmp_path, monkeypatch, train, test)
    dataset = load("cifar100")
    np.testing.assert_array_equal(dataset.train["label"], [99, 0, 42])
    assert (dataset.class_names[99], dataset.class_names[42]) == ("worm", "leopard")
    assert sorted(dataset.class_names) == list(dataset.class_names)


@pytest.fixture
def tiny_svhn(tmp_path, monkeypatch):
    """Publishes an SVHN of four examples a file and puts it into the data folder."""
    folder = tmp_path / "data/svhn"
    folder.mkdir(parents=True)
    remotes = []
    for seed, remote in enumerate(canonical.SVHN):
        variables = {"X": some_images(seed, 4, 32, 32, 3).transpose(1, 2, 3, 0)}
        variables["y"] = np.array([[10], [1], [2], [9]], np.uint8)
        scipy.io.savemat(folder / remote.name, variables, do_compression=True)
        remotes.append(remote._replace(checksum=md5((folder / remote.name).read_bytes())))
    monkeypatch.setattr(canonical, "SVHN", tuple(remotes))
    return folder


def test_svhn_loads_from_the_data_folder(load, tiny_svhn):
    dataset = load("svhn")
    np.testing.assert_array_equal(dataset.train["input"], some_images(0, 4, 32, 32, 3))
    np.testing.assert_array_equal(dataset.test["label"], [0, 1, 2, 9])


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_a_mutated_svhn_file_is_refused_before_it_is_parsed(load, tiny_svhn, data):
    path = tiny_svhn / "train_32x32.mat"
    content = path.read_bytes()
    mutated = data.draw(mutations(content).filter(lambda mutated: mutated != content))
    path.write_bytes(mutated)
    try:
        with pytest.raises(ValueError, match=r"train_32x32\.mat: MD5"):
            load("svhn")
    finally:
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.skipif(
    DATA_DIR is None or not (Path(DATA_DIR) / "mnist").is_dir(),
    reason="CABS_JAX_DATA names no folder with MNIST",
)
def test_the_real_mnist_has_its_known_statistics():
    dataset = datasets.load("mnist", data_dir=DATA_DIR)
    assert dataset.train["input"].shape == (60_000, 28, 28, 1)
    assert dataset.test["input"].shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose(dataset.train["input"].mean() / 255, 0.1307, atol=1e-4)
    np.testing.assert_array_equal(dataset.train["label"][:5], [5, 0, 4, 1, 9])
