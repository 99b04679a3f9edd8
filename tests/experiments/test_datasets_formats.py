"""Parsers and readers against files in exactly the canonical formats, damaged ones included."""

import gzip
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets import archives
from experiments.datasets.archives import read_file, read_tar
from experiments.datasets.formats import parse_cifar, parse_idx, read_svhn
from tests.experiments.data_files import (
    FUZZ,
    cifar_bytes,
    idx_bytes,
    mutations,
    result_or_error,
    some_images,
    tar_bytes,
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


@FUZZ
@given(st.data())
def test_a_mutated_gzip_file_gives_its_content_or_a_named_error(tmp_path, data):
    content = idx_bytes(some_images(4, 5, 6, 7))
    path = tmp_path / "images.gz"
    path.write_bytes(data.draw(mutations(gzip.compress(content))))
    result = result_or_error(read_file, path)
    if isinstance(result, ValueError):
        assert "images.gz" in str(result)
    else:
        # What is no longer gzip is passed on as it is, and is refused by its checksum later.
        assert result in (content, path.read_bytes())


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 16)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(ValueError, match=r"bomb\.gz.*more than 65,536 bytes"):
        read_file(path)


FILES = {"a/one": b"1" * 700, "two": b"", "a/b/three": b"3" * 512, "ü/" + "n" * 150: b"long"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_any_compression_is_read_whole(tmp_path, mode, tar_format):
    path = tmp_path / "archive"
    path.write_bytes(tar_bytes(FILES, mode=mode, format=tar_format))
    assert dict(read_tar(path)) == FILES


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    path = tmp_path / "evil.tar"
    path.write_bytes(tar_bytes({"fine": b"", name: b"x"}))
    with pytest.raises(ValueError, match=r"evil\.tar.*points outside the archive"):
        list(read_tar(path))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("train/cat/1.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ValueError, match="link, device or sparse"):
        list(read_tar(path))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_too_much_is_refused_before_reading(tmp_path, kind):
    member = tarfile.TarInfo("huge")
    member.type, member.size = kind, 1 << 40
    path = tmp_path / "lying.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match="claims 1,099,511,627,776 bytes"):
        list(read_tar(path))


def test_an_extended_header_cannot_raise_the_size(tmp_path):
    member = tarfile.TarInfo("huge")
    member.pax_headers = {"size": str(1 << 40)}
    path = tmp_path / "lying.tar"
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match=r"lying\.tar"):
        list(read_tar(path))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_DATASET_BYTES", 1 << 16)
    path = tmp_path / "bomb.tar.xz"
    path.write_bytes(tar_bytes({str(i): bytes(1 << 12) for i in range(100)}, mode="w:xz"))
    with pytest.raises(ValueError, match=r"bomb\.tar\.xz.*more than 65,536 bytes"):
        list(read_tar(path))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_truncated_archive_is_never_taken_for_a_shorter_one(tmp_path, mode):
    content = tar_bytes({str(i): b"x" * 600 for i in range(20)}, mode=mode)
    path = tmp_path / "short.tar"
    end = content.rstrip(b"\0")
    for cut in range(0, len(end), 97):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"short\.tar"):
            list(read_tar(path))


def test_a_damaged_header_in_the_middle_does_not_end_the_archive(tmp_path):
    content = bytearray(tar_bytes({str(i): b"x" * 600 for i in range(20)}))
    content[5 * 1536 + 20] ^= 0xFF
    path = tmp_path / "damaged.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad or missing header"):
        list(read_tar(path))


@FUZZ
@given(st.data())
def test_a_mutated_archive_yields_files_or_a_named_error(tmp_path, data):
    mode = data.draw(st.sampled_from(["w", "w:gz", "w:bz2", "w:xz"]))
    content = tar_bytes(
        FILES,
        mode=mode,
        format=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])),
    )
    path = tmp_path / "fuzz.tar"
    path.write_bytes(data.draw(mutations(content)))
    result = result_or_error(lambda: dict(read_tar(path)))
    if isinstance(result, ValueError):
        assert "fuzz.tar" in str(result)
    elif mode == "w":
        assert sum(map(len, result.values())) <= len(content)
    else:
        assert result == FILES
