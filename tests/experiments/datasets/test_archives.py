"""Files and tars read within bounds: of any compression, damaged, hostile, or too large."""

import gc
import gzip
import itertools
import lzma
import tarfile
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets import archives
from experiments.datasets.archives import read_file, read_tar
from tests.experiments.datasets.data_files import (
    FUZZ,
    idx_bytes,
    mutations,
    result_or_error,
    some_images,
    tar_bytes,
)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["BZh9 notes", "]\0\0", "\x1f\x8b", "\xfd7zXZ"])
def test_a_plain_tar_whose_first_name_looks_like_compression_is_read(tmp_path, name):
    content = bytearray(tar_bytes({"x" * 10: b"content"}, format=tarfile.USTAR_FORMAT))
    content[:10] = name.encode("latin-1").ljust(10, b"\0")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path = tmp_path / "plain.tar"
    path.write_bytes(content)
    (content,) = dict(read_tar(path)).values()
    assert content == b"content"


@pytest.mark.slow
def test_the_headers_of_an_archive_are_not_kept(tmp_path):
    path = tmp_path / "many.tar"
    path.write_bytes(tar_bytes({f"{i:05}": b"" for i in range(4000)}))

    def kept_bytes(num_members: int) -> int:
        tracemalloc.start()
        members = read_tar(path)
        for _ in itertools.islice(members, num_members):
            pass
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        members.close()
        return kept

    assert kept_bytes(4000) < 1.2 * kept_bytes(400)


def test_an_extended_header_larger_than_any_name_is_refused(tmp_path):
    path = tmp_path / "attributes.tar"
    member = tarfile.TarInfo("x")
    member.pax_headers = {"comment": "x" * 100_000}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"attributes\.tar.*claims 100,0.. bytes .allowed: 65,536"):
        list(read_tar(path))


@pytest.mark.parametrize("size", [-1, -512, -1024, -(1 << 40)])
def test_a_negative_size_in_an_extended_header_ends_at_once(tmp_path, size):
    path = tmp_path / "backwards.tar"
    member = tarfile.TarInfo("x")
    member.pax_headers = {"size": str(size)}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match=r"backwards\.tar: damaged"):
        list(read_tar(path))


@pytest.mark.parametrize("version", ["old", "1.0"])
def test_the_map_of_a_sparse_file_is_never_read(tmp_path, version):
    member = tarfile.TarInfo("sparse")
    if version == "old":
        member.type = tarfile.GNUTYPE_SPARSE
        head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        head[482] = 1  # the map goes on in the next block, and from there in the next
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        body = (bytes(504) + b"\1" + bytes(7)) * 4096
    else:
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        head = member.tobuf(tarfile.PAX_FORMAT)
        body = b"9999999\n" + b"1\n" * (1 << 20)
    path = tmp_path / "sparse.tar"
    path.write_bytes(head + body)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"sparse\.tar.*sparse"):
        list(read_tar(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "escape.tar"
    path.write_bytes(tar_bytes({"../\x1b]0;owned\x07\n": b"x"}))
    with pytest.raises(ValueError, match="points outside the archive") as info:
        list(read_tar(path))
    assert str(info.value).isprintable()


def test_an_xz_file_cannot_ask_for_more_memory_than_the_strongest_preset(tmp_path):
    strongest = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    path = tmp_path / "large.tar.xz"
    path.write_bytes(lzma.compress(tar_bytes(FILES), filters=[strongest]))
    assert dict(read_tar(path)) == FILES
    content = bytearray(path.read_bytes())
    assert content[14:16] == bytes([lzma.FILTER_LZMA2, 1])
    content[16] = 40  # the size of the dictionary: 4 GiB
    header = 12 + 4 * (content[12] + 1)
    content[header - 4 : header] = zlib.crc32(content[12 : header - 4]).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"large\.tar\.xz: damaged, .*[Mm]emory usage limit"):
        list(read_tar(path))


def test_xz_streams_one_after_the_other_with_padding_are_one_file(tmp_path):
    content = tar_bytes(FILES)
    path = tmp_path / "streams.tar.xz"
    half = len(content) // 2
    parts = [lzma.compress(content[:half]), lzma.compress(content[half:])]
    path.write_bytes(parts[0] + bytes(8) + parts[1] + bytes(4))
    assert dict(read_tar(path)) == FILES
    path.write_bytes(parts[0] + parts[1] + b"trailing")
    with pytest.raises(ValueError, match=r"streams\.tar\.xz: damaged"):
        list(read_tar(path))


def test_an_archive_of_the_old_lzma_format_is_read(tmp_path):
    path = tmp_path / "old.tar.lzma"
    path.write_bytes(lzma.compress(tar_bytes(FILES), format=lzma.FORMAT_ALONE))
    assert dict(read_tar(path)) == FILES
