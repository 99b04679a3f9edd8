"""A run's folder: config.json, metrics.jsonl, evaluations.jsonl, summary.json."""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.training.lock import locked

CONFIG, METRICS, EVALUATIONS, SUMMARY, FIGURE = (
    "config.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "summary.json",
    "figure.png",
)
SUMMARY_KEYS = (
    "train_loss",
    "test_accuracy",
    "steps",
    "examples",
    "seconds",
    "compile_seconds",
    "compilations",
    "diverged",
)
LOCK, PARTIAL = ".lock", ".partial"


class Record(NamedTuple):
    """What a run wrote. Columns are float arrays, one entry a line; null became NaN.

    The summary is empty until the run has finished.
    """

    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    summary: dict[str, Any]


class ResumeError(ValueError):
    """The files in a folder are not those of the run that should go on in it."""


class Lines:
    """A file of JSON objects, one a line, each on disk or gone whole once `write` returns.

    Args:
      path: The file; None writes nothing.
      keep: How many bytes of it to keep; what follows them is cut off.

    Raises:
      OSError: The file cannot be opened.
      ResumeError: It is shorter than `keep`.

    Attributes:
      size: Bytes of the file, all of them whole lines.
    """

    def __init__(self, path: Path | None, keep: int = 0):
        self._file = None if path is None else path.open("ab", buffering=0)
        self.size = keep
        if self._file is not None:
            found = self._file.seek(0, os.SEEK_END)
            if found < keep:
                self._file.close()
                raise ResumeError(f"{path} was cut to {found} bytes, {keep} were written.")
            self._file.truncate(keep)

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
          OSError: It cannot be written; the lines before it stay.
        """
        if self._file is None:
            return
        line = to_json(value).encode()
        rest = line
        try:
            while rest:  # a disk that fills up takes a part of it first
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size)
            raise OSError(error.errno, error.strerror, self._file.name) from error
        self.size += len(line)

    def sync(self) -> None:
        """Returns once the lines would survive a loss of power."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def held(
    folder: Path | None, config: Mapping[str, Any], resume: bool
) -> Iterator[Callable[[], None]]:
    """Makes `folder` that of a run of this configuration, which no other process may write.

    Args:
      folder: It is made where it is missing; None is no folder.
      config: The run's.
      resume: Whether a run of this configuration may be in it already.

    Returns:
      A check that it is still there, and still ours, which raises OSError.

    Raises:
      InUseError: Another process writes it.
      OSError: It holds something else, or cannot be written.
      ResumeError: It holds a run of another configuration.
    """
    if folder is None:
        yield lambda: None
        return
    check_usable = check_resumable if resume else lambda folder, config: check_unused(folder)
    check_usable(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK) as check:
        check_usable(folder, config)  # another process may have begun and ended in between
        write_json(folder / CONFIG, config)
        yield check


def check_unused(folder: Path) -> None:
    """Raises FileExistsError unless `folder` is missing or empty."""
    if folder.exists() and (not folder.is_dir() or _names(folder) - {LOCK}):
        raise FileExistsError(
            f"{folder} is not empty; name a new folder, results are never mixed, or --resume."
        )


def check_resumable(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks that `folder` is missing, empty, or holds a run of this configuration.

    Raises:
      FileExistsError: It holds something else than a run.
      ResumeError: The run has another configuration; the message shows the difference.
    """
    stored = read_config(folder)
    if stored is not None:
        check_equal(f"the run in {folder}", stored, config)
    elif folder.exists() and (not folder.is_dir() or _names(folder) - {LOCK, CONFIG + PARTIAL}):
        raise FileExistsError(f"{folder} holds no {CONFIG}, so there is no run in it to resume.")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_equal(owner: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ResumeError, which says what differs, unless the values under the keys are equal."""
    differences = [
        f"{key} {then.get(key)!r}, now {now.get(key)!r}"
        for key in dict.fromkeys((*then, *now))
        if then.get(key) != now.get(key)
    ]
    if differences:
        raise ResumeError(f"{owner} has {'; '.join(differences)}.")


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in `folder`, or None where there is none.

    Raises:
      ResumeError: The file is damaged.
    """
    return _read_object(folder / CONFIG)


def fresh_folder(parent: Path, name: str) -> Path:
    """Makes and returns `parent/name-N` for the first N from 1 that does not exist."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON: what is not a finite number becomes null, which every parser reads."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes all of the file or, when interrupted, none of it."""
    with replacing(path) as partial:
        partial.write_text(to_json(value, indent=2), encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` once all is on disk.

    Raises:
      OSError: It cannot be written; what `path` held before stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # it may be a link to what is not ours
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> Record:
    """Reads back what a run wrote into `folder`, or has written so far.

    Raises:
      OSError: A file is missing or cannot be read.
      ResumeError: A file is damaged, or is not that of a run.
    """
    return Record(
        config=read_config(folder) or {},
        metrics=_columns(folder / METRICS),
        evaluations=_columns(folder / EVALUATIONS),
        summary=read_summary(folder) or {},
    )


def _columns(path: Path) -> dict[str, np.ndarray]:
    """The whole lines of a file of JSON objects; none of them gives no columns."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        columns = {key: np.array([row[key] for row in rows], float) for key in rows and rows[0]}
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged: {error!r}.") from error
    if any(column.ndim > 1 for column in columns.values()):
        raise ResumeError(f"{path} is damaged: it holds lists where numbers belong.")
    return columns


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of the run in `folder`, or None while it is unfinished.

    Raises:
      ResumeError: The file is damaged, or is not that of a run.
    """
    summary = _read_object(folder / SUMMARY)
    if summary is not None and (missing := [key for key in SUMMARY_KEYS if key not in summary]):
        raise ResumeError(
            f"{folder / SUMMARY} is no summary of a run, for it lacks {', '.join(missing)}."
        )
    return summary


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no file; ResumeError if it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ResumeError(f"{path} is damaged: it holds no JSON object.")
    return content
