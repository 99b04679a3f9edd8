"""Decoded data sets kept on disk: found by key, verified by checksum, the longest unused removed.

An entry is a folder of arrays that appears whole, by a rename: processes that make the same one at
the same time need no lock, and the first one's stays.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.datasets.dataset import MAX_DATASET_BYTES, Dataset, fingerprint, make_dataset

MAX_CACHE_BYTES = 4 * MAX_DATASET_BYTES
KEY_LENGTH = 32
_ENTRY = "[0-9a-f]" * KEY_LENGTH
_TEMPORARY = f".{_ENTRY}-*"
_ABANDONED_SECONDS = 86_400.0  # after which a temporary folder's writer is taken to be dead


def load_or_make(name: str, key: str, cache_dir: Path, make: Callable[[], Dataset]) -> Dataset:
    """The data set kept under `key` in `cache_dir`, else the one that `make` returns, then kept.

    A damaged entry is made again, with a warning; a cache that cannot be written costs a warning
    only. The arrays of an entry are memory-mapped, read-only: processes share them.

    Args:
      name: Name of the data set, which is not kept.
      key: `KEY_LENGTH` hexadecimal digits that change with all that the data set depends on.
      cache_dir: Folder of the cache, created if need be.
      make: Makes the data set.
    """
    entry = cache_dir / "decoded" / key
    kept = _read(entry, name)
    if kept is not None:
        return kept
    dataset = make()
    try:
        _write(entry, dataset)
    except OSError as error:
        warnings.warn(
            f"could not cache {name} in {cache_dir}, it is decoded again next time: {error}.",
            stacklevel=2,
        )
        return dataset
    _bound(entry)
    return _read(entry, name) or dataset


def _read(entry: Path, name: str) -> Dataset | None:
    """The data set of an entry; None if there is none or, with a warning, if it is damaged."""
    if not entry.is_dir():
        return None
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        train, test = (
            tuple(
                np.load(entry / f"{split}_{key}.npy", mmap_mode="r", allow_pickle=False)
                for key in ("input", "label")
            )
            for split in ("train", "test")
        )
        dataset = make_dataset(name, train, test, tuple(manifest["class_names"]))
        if fingerprint(dataset) != manifest["fingerprint"]:
            raise ValueError("its content is not what was written")
    except Exception as error:  # whatever the readers of damaged files raise
        warnings.warn(f"{entry}: damaged cache, decoded again: {error!r}.", stacklevel=3)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):  # a cache that others share may be read-only
        os.utime(entry)
    return dataset


def _write(entry: Path, dataset: Dataset) -> None:
    """Writes beside the final place and renames, so that the entry is complete or absent."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        for split, arrays in {"train": dataset.train, "test": dataset.test}.items():
            for key, array in arrays.items():
                np.save(temporary / f"{split}_{key}.npy", array, allow_pickle=False)
        manifest = {"class_names": dataset.class_names, "fingerprint": fingerprint(dataset)}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        try:
            os.rename(temporary, entry)
        except OSError:
            # Another process may have put the same arrays there first.
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _bound(newest: Path) -> None:
    """Removes what dead writers left and, above `MAX_CACHE_BYTES`, the entries longest unused."""
    with contextlib.suppress(OSError):  # others may remove them as well, or alone be allowed to
        for temporary in newest.parent.glob(_TEMPORARY):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(temporary, ignore_errors=True)
        total = 0
        found = (path for path in newest.parent.glob(_ENTRY) if path.is_dir())
        entries = sorted(found, key=os.path.getmtime, reverse=True)
        for entry in (newest, *(entry for entry in entries if entry != newest)):
            total += sum(file.stat().st_size for file in entry.iterdir())
            if total > MAX_CACHE_BYTES and entry != newest:
                shutil.rmtree(entry, ignore_errors=True)
