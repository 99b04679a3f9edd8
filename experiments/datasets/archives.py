"""Reads and verifies files and tar archives: in memory, within bounds, never unpacked to disk."""

import bz2
import gzip
import hashlib
import io
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

from experiments.datasets.dataset import MAX_DATASET_BYTES

MAX_FILE_BYTES = 256 << 20
_MAX_EXTENDED_HEADER_BYTES = 64 << 10  # long names and attributes, which tarfile parses whole
_EXTENDED_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_CHUNK_BYTES = 1 << 20
_MAX_XZ_MEMORY_BYTES = (
    128 << 20
)  # twice what the strongest preset asks for; a file may ask for 4 GiB
# What the readers answer damaged input with.
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    OSError,
    ValueError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
)


def read_file(path: Path) -> bytes:
    """Whole content of a file, decompressed if it is compressed, of at most `MAX_FILE_BYTES`.

    Raises:
      ValueError: If the file is damaged or its content too large.
    """
    chunks, size = [], 0
    with _open(path) as stream:
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > MAX_FILE_BYTES:
                    raise ValueError(f"holds more than {MAX_FILE_BYTES:,} bytes")
                chunks.append(chunk)
        except _DAMAGE as error:
            raise ValueError(f"{path}: truncated or corrupted: {error}.") from error
    return b"".join(chunks)


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of each file of a tar archive, in the archive's order.

    The archive may be plain or compressed by gzip, bzip2 or xz. It is read as a stream, so memory
    holds one member at a time, and to its end, so that checksums of the compression are verified.

    Raises:
      ValueError: If the archive is damaged or truncated, a member is a link, a device or a sparse
        file, its name is absolute or climbs with "..", or it is larger than `MAX_FILE_BYTES`.
    """
    with _open(path) as stream:
        bounded = _BoundedStream(stream, MAX_DATASET_BYTES)
        try:
            with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_CheckedHeader) as archive:
                while (member := archive.next()) is not None:
                    # It keeps all headers, of which there may be millions.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not member.isdir():
                        yield _checked_name(member), _read_member(archive, member)
            while bounded.read(_CHUNK_BYTES):
                pass
        except _DAMAGE as error:
            raise ValueError(f"{path}: damaged, unsafe or not a tar archive: {error}.") from error


def _checked_name(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ValueError(f"member {member.name!r} points outside the archive")
    return posixpath.normpath(member.name)  # Python 3.12 keeps all that pathlib splits for ever


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or member.issparse():
        raise ValueError(f"member {member.name!r} is a link, device or sparse file")
    _check_size(member)
    content = archive.extractfile(member)
    assert content is not None  # it is None only for what was refused above
    return content.read()


def check_file(path: Path, checksum: str) -> None:
    """Raises a ValueError unless the file's bytes have this checksum, "md5:..." or "sha1:..."."""
    with path.open("rb") as stream:
        _check(stream, path, checksum)


def check_content(content: bytes, path: Path, checksum: str) -> None:
    """Raises a ValueError unless the (uncompressed) content of the file has this checksum."""
    _check(io.BytesIO(content), path, checksum)


def _check(stream: io.BufferedIOBase, path: Path, checksum: str) -> None:
    algorithm, published = checksum.split(":")
    digest = hashlib.file_digest(stream, partial(hashlib.new, algorithm, usedforsecurity=False))
    if digest.hexdigest() != published:
        raise ValueError(
            f"{path}: {algorithm.upper()} {digest.hexdigest()} where the published file has "
            f"{published}: truncated, corrupted or another file; fetch it again."
        )


def _open(path: Path) -> io.BufferedIOBase:
    with path.open("rb") as stream:
        start = stream.read(tarfile.BLOCKSIZE)
    for magic, opener in _OPENERS.items():
        # A plain tar starts with the name of its first member, which may look like compression.
        if start.startswith(magic) and not _is_tar_header(start):
            return opener(path)
    return path.open("rb")


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _check_size(header: tarfile.TarInfo) -> None:
    limit = _MAX_EXTENDED_HEADER_BYTES if header.type in _EXTENDED_HEADERS else MAX_FILE_BYTES
    if not 0 <= header.size <= limit:
        raise ValueError(
            f"member {header.name!r} claims {header.size:,} bytes (allowed: {limit:,})"
        )


class _CheckedHeader(tarfile.TarInfo):
    """Refuses what tarfile would take for the archive's end, and sizes it would try to allocate."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise ValueError(f"bad or missing header ({error})") from error
        if header.type == tarfile.GNUTYPE_SPARSE:
            header._refuse_sparse()
        _check_size(header)
        return header

    def _refuse_sparse(self, *_: object) -> NoReturn:
        raise ValueError(f"member {self.name!r} is a link, device or sparse file")

    # What tarfile calls to read the map of a sparse file from the archive: it may be endless.
    _proc_gnusparse_10 = _refuse_sparse


class _XzReader(io.RawIOBase):
    """Decompressed content of an xz file; `lzma.open` takes all the memory that it asks for."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._decompressor = self._next_stream()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        data = b""
        while not data:
            compressed = b""
            if self._decompressor.eof:
                # Zeros pad a stream; another one may follow.
                rest = self._decompressor.unused_data.lstrip(b"\0")
                compressed = rest or self._file.read(_CHUNK_BYTES).lstrip(b"\0")
                if not compressed:
                    return 0
                self._decompressor = self._next_stream()
            elif self._decompressor.needs_input:
                compressed = self._file.read(_CHUNK_BYTES)
                if not compressed:
                    raise EOFError("the compressed data end too early")
            data = self._decompressor.decompress(compressed, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next_stream(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY_BYTES)


def _open_xz(path: Path) -> io.BufferedIOBase:
    return io.BufferedReader(_XzReader(path))


class _BoundedStream(io.BufferedIOBase):
    """Passes on `stream` until `limit` bytes have been read: compressed data can hold anything."""

    def __init__(self, stream: io.BufferedIOBase, limit: int):
        self._stream = stream
        self._limit = limit
        self._remaining = limit

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(size)
        self._remaining -= len(data)
        if self._remaining < 0:
            raise ValueError(f"holds more than {self._limit:,} bytes")
        return data


_OPENERS: dict[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": _open_xz,
    b"\x5d\x00\x00": _open_xz,
}
