"""Parsers against files in exactly the canonical formats, damaged ones included."""

import struct
import tracemalloc

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets.formats import parse_cifar, parse_idx, read_svhn
from tests.experiments.datasets.data_files import (
    FUZZ,
    cifar_bytes,
    idx_bytes,
    result_or_error,
    some_images,
)


def test_idx_images_and_labels_come_back_as_written():
    images, labels = some_images(0, 7, 4, 5), np.arange(7)
    np.testing.assert_array_equal(parse_idx(idx_bytes(images), "f", ndim=3), images)
    np.testing.assert_array_equal(parse_idx(idx_bytes(labels), "f", ndim=1), labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train-images: not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\0\x08\x03" + b"\0" * 5, "truncated in its header"),
        (b"\0\0\x0d\x03" + b"\0" * 20, "not an IDX file of uint8"),
        (idx_bytes(np.arange(5)), "3 dimensions"),
        (idx_bytes(some_images(0, 3, 4, 5))[:-1], "takes 76 bytes, the file has 75"),
        (idx_bytes(some_images(0, 3, 4, 5)) + b"\0", "takes 76 bytes, the file has 77"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated or corrupted"),
    ],
)
def test_a_damaged_idx_file_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_idx(content, "train-images", ndim=3)


@FUZZ
@given(st.binary(max_size=64), st.sampled_from([1, 3]), st.booleans())
def test_idx_bytes_parse_to_what_they_claim_or_raise_value_error(content, ndim, with_magic):
    content = bytes([0, 0, 8, ndim]) + content if with_magic else content
    result = result_or_error(parse_idx, content, "f", ndim)
    assert isinstance(result, ValueError) or idx_bytes(result) == content


def test_a_lying_idx_header_allocates_nothing():
    content = b"\0\0\x08\x03" + struct.pack(">3I", 60_000, 2**31, 2**31) + b"\0" * 100
    tracemalloc.start()
    with pytest.raises(ValueError, match="truncated or corrupted"):
        parse_idx(content, "f", ndim=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_cifar10_records_come_back_as_written():
    images, labels = some_images(1, 6, 32, 32, 3), np.array([3, 9, 0, 1, 2, 5])
    got_images, got_labels = parse_cifar(cifar_bytes(images, labels), "f", 6, label_bytes=1)
    np.testing.assert_array_equal(got_images, images)
    np.testing.assert_array_equal(got_labels, labels)
    assert got_images.flags.c_contiguous


def test_cifar100_takes_the_fine_label():
    images, coarse, fine = some_images(2, 3, 32, 32, 3), np.array([1, 2, 3]), np.array([99, 0, 50])
    got_images, got_labels = parse_cifar(cifar_bytes(images, coarse, fine), "f", 3, label_bytes=2)
    np.testing.assert_array_equal(got_images, images)
    np.testing.assert_array_equal(got_labels, fine)


@pytest.mark.parametrize("cut", [1, 3073])
def test_a_truncated_cifar_file_is_refused(cut):
    content = cifar_bytes(some_images(1, 6, 32, 32, 3), np.zeros(6))[:-cut]
    with pytest.raises(ValueError, match=r"test_batch.bin: truncated.*18,438 bytes"):
        parse_cifar(content, "test_batch.bin", 6, label_bytes=1)


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn_comes_back_as_written_with_ten_as_zero(tmp_path, compressed):
    images = some_images(3, 5, 32, 32, 3)
    path = tmp_path / "train_32x32.mat"
    variables = {"X": images.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [9], [2], [10]])}
    scipy.io.savemat(path, variables, do_compression=compressed)
    got_images, got_labels = read_svhn(path)
    np.testing.assert_array_equal(got_images, images)
    np.testing.assert_array_equal(got_labels, [1, 0, 9, 2, 0])
    assert got_images.flags.c_contiguous
