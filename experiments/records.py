"""A run's folder: config.json, metrics.jsonl, evaluations.jsonl, summary.json."""

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CONFIG, METRICS, EVALUATIONS, SUMMARY, FIGURE = (
    "config.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "summary.json",
    "figure.png",
)


class Record(NamedTuple):
    """What a finished run wrote. Columns are float arrays, one entry a line; null became NaN."""

    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    summary: dict[str, Any]


def check_unused(folder: Path) -> None:
    """Raises FileExistsError unless `folder` is missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder, results are never mixed")


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_json(value, indent=2), encoding="utf-8")
    os.replace(partial, path)


def read(folder: Path) -> Record:
    """Reads back what a run wrote into `folder`."""

    def columns(name: str) -> dict[str, np.ndarray]:
        rows = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        keys = rows[0] if rows else ()
        return {key: np.array([row[key] for row in rows], float) for key in keys}

    return Record(
        config=json.loads((folder / CONFIG).read_text("utf-8")),
        metrics=columns(METRICS),
        evaluations=columns(EVALUATIONS),
        summary=json.loads((folder / SUMMARY).read_text("utf-8")),
    )
