"""Parsers of the canonical binary formats: IDX (MNIST), CIFAR binary, SVHN's MATLAB files.

The parsers compare what a header claims with the bytes at hand before they allocate anything, and
name the file in their errors.
"""

import math
from pathlib import Path

import numpy as np
import scipy.io

_IDX_UINT8 = 8
_CIFAR_SHAPE = (3, 32, 32)


def parse_idx(data: bytes, source: str, ndim: int) -> np.ndarray:
    """Array in an IDX file: two zero bytes, type, rank, big-endian uint32 sizes, elements.

    Args:
      data: Uncompressed content of the file.
      source: The file's name, for errors.
      ndim: Rank the array must have: 3 for images, 1 for labels.

    Returns:
      uint8 array, a view of `data`.

    Raises:
      ValueError: If this is not IDX of uint8 and that rank, or its length is not what it claims.
    """
    if data[:4] != bytes([0, 0, _IDX_UINT8, ndim]):
        raise ValueError(
            f"{source}: not an IDX file of uint8 with {ndim} dimensions "
            f"(it starts with {data[:4].hex(' ')})."
        )
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(f"{source}: truncated in its header.")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"{source}: truncated or corrupted: shape {shape} takes {expected:,} bytes, "
            f"the file has {len(data):,}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def parse_cifar(
    data: bytes, source: str, num_records: int, label_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels in a CIFAR binary file: records of labels, then 32x32 red, green, blue.

    Args:
      data: Content of the file.
      source: The file's name, for errors.
      num_records: Number of examples the file must have.
      label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, whose second is the fine label.

    Returns:
      uint8 (n, 32, 32, 3) images and uint8 (n,) labels.

    Raises:
      ValueError: If the file's length is not that of `num_records` records.
    """
    record_bytes = label_bytes + math.prod(_CIFAR_SHAPE)
    if len(data) != num_records * record_bytes:
        raise ValueError(
            f"{source}: truncated, corrupted or another file: {num_records:,} records of "
            f"{record_bytes:,} bytes take {num_records * record_bytes:,} bytes, "
            f"the file has {len(data):,}."
        )
    records = np.frombuffer(data, np.uint8).reshape(num_records, record_bytes)
    images = records[:, label_bytes:].reshape(-1, *_CIFAR_SHAPE)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), records[:, label_bytes - 1]


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels in a verified cropped-digits file of SVHN, where digit 0 is stored as 10.

    SciPy reads it, which can crash the process on a damaged file: compare checksums first.

    Returns:
      uint8 (n, 32, 32, 3) images and uint8 (n,) labels, the digits.
    """
    variables = scipy.io.loadmat(path, variable_names=("X", "y"))
    images = np.ascontiguousarray(variables["X"].transpose(3, 0, 1, 2))
    return images, variables["y"][:, 0] % 10
