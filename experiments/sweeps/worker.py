"""A process of a sweep: makes one run after the other, and tells how they go."""

import contextlib
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from experiments import datasets, environment
from experiments.sweeps.plan import Run
from experiments.training import run_folder
from experiments.training.lock import InUseError, locked
from experiments.training.shared_programs import SharedPrograms, cache_settings
from experiments.training.train import set_up, train

ENVIRONMENT, CACHE = "environment.json", ".cache"
PARTIAL, ERROR = ".partial-", ".error.txt"
PROGRESS_SECONDS = 0.5


def work(connection: Connection, out: Path, data_dir: str | None) -> None:
    """The life of a worker: data, imports and executables are paid for once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    for name, value in cache_settings(out / CACHE).items():
        jax.config.update(name, value)
    loaded: dict[str, datasets.Dataset] = {}
    shared: dict[tuple[Any, ...], SharedPrograms] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while (run := connection.recv()) is not None:
            try:
                with _claimed(out / run.name):
                    summary = _make(run, connection, out, data_dir, loaded, shared)
            except BrokenPipeError:
                raise
            except InUseError as error:
                connection.send(("elsewhere", str(error)))
            except Exception:
                told = traceback.format_exc().strip()
                write_error(out, run, told)
                connection.send(("failed", told))
            else:
                connection.send(("done", summary))


@contextlib.contextmanager
def _claimed(final: Path) -> Iterator[None]:
    """Makes a run ours alone, and removes what one that was killed left of it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.with_name(final.name + run_folder.LOCK)):
        if run_folder.read_summary(final) is not None:
            raise InUseError("another process has just finished it.")
        for remains in final.parent.glob(f"{final.name}{PARTIAL}*"):
            shutil.rmtree(remains)
        yield


def _make(
    run: Run,
    connection: Connection,
    out: Path,
    data_dir: str | None,
    loaded: dict[str, datasets.Dataset],
    shared: dict[tuple[Any, ...], SharedPrograms],
) -> dict[str, Any]:
    config = run.config
    if config.dataset not in loaded:
        loaded[config.dataset] = datasets.load(config.dataset, data_dir=data_dir)
    dataset = loaded[config.dataset]
    experiment = set_up(config, dataset=dataset)
    net = (config.model, dataset.input_shape, dataset.num_classes, config.width)
    if net not in shared:
        shared[net] = SharedPrograms(experiment.model)

    unit, limit = config.limit
    shown = 0.0

    def observe(metrics: dict[str, Any]) -> None:
        nonlocal shown
        if time.monotonic() - shown >= PROGRESS_SECONDS:
            note = f"loss {metrics['loss']:.4f}  batch {metrics['batch_size']}"
            connection.send(("progress", (metrics[unit] / limit, note)))
            shown = time.monotonic()

    final = out / run.name
    partial = final.with_name(f"{final.name}{PARTIAL}{os.getpid()}")
    summary = train(experiment, partial, observe, shared=shared[net])
    run_folder.write_json(partial / ENVIRONMENT, environment.describe())
    shutil.rmtree(final, ignore_errors=True)  # it holds no summary, else it were kept
    os.replace(partial, final)
    (out / (run.name + ERROR)).unlink(missing_ok=True)
    return summary


def write_error(out: Path, run: Run, error: str) -> None:
    """Leaves the error of a run beside where its folder would be."""
    path = out / (run.name + ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(error + "\n", encoding="utf-8")
