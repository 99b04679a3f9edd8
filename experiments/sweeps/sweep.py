"""Runs a plan: many short runs in a few processes, each on its own cores, all of them resumable."""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments import datasets, environment
from experiments.sweeps.plan import Run
from experiments.training import run_folder, train
from experiments.training.config import RunConfig
from experiments.training.shared_programs import Programs, cache_settings

PLAN, ENVIRONMENT, CACHE = "sweep.toml", "environment.json", ".cache"
PARTIAL, ERROR = ".partial-", ".error.txt"
PROGRESS_SECONDS = 0.5


class SweepError(ValueError):
    """What is in the folder cannot go on as this sweep."""


class Outcome(NamedTuple):
    """How the runs of a sweep ended: numbers, and the failed runs with their errors."""

    kept: int
    finished: int
    diverged: int
    failed: dict[str, str]


def sweep(
    plan_text: str,
    runs: Sequence[Run],
    out: Path,
    *,
    jobs: int = 1,
    data_dir: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Makes all runs that `out` does not hold yet, each into the folder of its name.

    A run is written beside its place and moved there when it is finished, so that a kill at any
    moment leaves whole runs, which the next call keeps, and remains, which it removes. Calls at
    the same time may share `out` if no run is in both. Runs of one seed draw the same parameters
    and the same order of examples, whatever the method.

    Args:
      plan_text: The plan in TOML, which is kept beside the results.
      runs: Those of the plan to make, in this order.
      out: Folder of the sweep.
      jobs: Processes; the cores that this one may use are shared out among them.
      data_dir: Holds the data sets.
      console: Where progress is shown.

    Raises:
      SweepError: `out` holds a run of another configuration, or jobs is not positive.
      OSError: `out` cannot be written.
    """
    if jobs < 1:
        raise SweepError(f"jobs must be at least 1, got {jobs}")
    console = console or Console()
    todo = [run for run in runs if not is_finished(out / run.name, run.config)]
    out.mkdir(parents=True, exist_ok=True)
    with run_folder.replacing(out / PLAN) as partial:
        partial.write_text(plan_text, encoding="utf-8")
    for run in todo:  # others may be under way, in another shard
        for remains in out.glob(f"{run.name}{PARTIAL}*"):
            shutil.rmtree(remains)
    kept = len(runs) - len(todo)
    if kept:
        console.print(f"{kept} of {len(runs)} runs are finished already")
    diverged, failed = 0, {}
    with _bars(console) as bars, _Pool(out, jobs, data_dir, todo, bars) as pool:
        overall = bars.add_task("all runs", total=len(todo), note="")
        for run, summary, error in pool.results(overall):
            if error:
                failed[run.name] = error
                console.print(f"failed: {run.name}: {error.splitlines()[-1]}", markup=False)
            else:
                diverged += bool(summary["diverged"])
                if not console.is_terminal:
                    console.print(_line(run, summary), markup=False, soft_wrap=True)
    return Outcome(kept, len(todo) - len(failed), diverged, failed)


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether `folder` holds this run, whole.

    Raises:
      SweepError: It holds the run of another configuration.
    """
    if run_folder.read_summary(folder) is None:
        return False
    stored = run_folder.read_config(folder) or {}
    if unknown := stored.keys() - {field.name for field in dataclasses.fields(RunConfig)}:
        raise SweepError(f"{folder} has unknown keys: {', '.join(sorted(unknown))}")
    try:
        run_folder.check_equal(
            f"the run in {folder}",
            dataclasses.asdict(RunConfig(**stored)),
            dataclasses.asdict(config),
        )
    except run_folder.ResumeError as error:
        raise SweepError(f"{error}: delete that folder or use another --out") from error
    return True


class _Worker:
    """A process, the run that it is at, and its bar."""

    def __init__(self, out: Path, data_dir: str | None, cores: set[int], bar: TaskID):
        self.cores, self.bar = cores, bar
        self.run: Run | None = None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, out, data_dir), daemon=True)
        with _on_cores(cores):  # inherited, so that all threads of the process keep to them
            self.process.start()
        theirs.close()


class _Pool:
    """Workers that make runs until none is left; leaving it ends them."""

    def __init__(
        self, out: Path, jobs: int, data_dir: str | None, runs: Iterable[Run], bars: Progress
    ):
        self._out, self._data_dir, self._bars = out, data_dir, bars
        self._todo = deque(runs)
        jobs = min(jobs, len(self._todo))
        cores = environment.cores()
        self._shares = [set(cores[i::jobs]) or set(cores) for i in range(jobs)]
        self._workers: list[_Worker] = []

    def results(self, overall: TaskID) -> Iterator[tuple[Run, dict[str, Any], str]]:
        """Each run as it ends, with its summary or else its error."""
        for share in self._shares:
            bar = self._bars.add_task("", total=1, note="starting")
            self._start(share, bar)
        fractions: dict[str, float] = {}
        while busy := {w.connection: w for w in self._workers if w.run is not None}:
            for ready in multiprocessing.connection.wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                run = worker.run
                assert run is not None
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    kind, content = "failed", f"its process died ({worker.process.exitcode})"
                    _write_error(self._out, run, content)
                    self._workers.remove(worker)
                    self._start(worker.cores, worker.bar)
                if kind == "progress":
                    fraction, note = content
                    self._bars.update(worker.bar, completed=fraction, note=note)
                else:
                    fraction = 1.0
                    yield (run, content, "") if kind == "done" else (run, {}, content)
                    if worker in self._workers:
                        self._give(worker)
                fractions[run.name] = fraction
                self._bars.update(overall, completed=sum(fractions.values()))

    def _start(self, cores: set[int], bar: TaskID) -> None:
        if self._todo:
            worker = _Worker(self._out, self._data_dir, cores, bar)
            self._workers.append(worker)
            self._give(worker)

    def _give(self, worker: _Worker) -> None:
        worker.run = self._todo.popleft() if self._todo else None
        if worker.run is not None:
            self._bars.update(worker.bar, description=worker.run.name, completed=0, note="")
        with contextlib.suppress(BrokenPipeError):  # it died: the pipe's end will tell
            worker.connection.send(worker.run)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            if exception[0] is not None:
                worker.process.terminate()
            worker.process.join()


def _work(connection: Connection, out: Path, data_dir: str | None) -> None:
    """The life of a worker: data, imports and executables are paid for once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    for name, value in cache_settings(out / CACHE).items():
        jax.config.update(name, value)
    loaded: dict[str, datasets.Dataset] = {}
    programs: dict[tuple[Any, ...], Programs] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while (run := connection.recv()) is not None:
            try:
                summary = _make(run, connection, out, data_dir, loaded, programs)
            except BrokenPipeError:
                raise
            except Exception:
                error = traceback.format_exc().strip()
                _write_error(out, run, error)
                connection.send(("failed", error))
            else:
                connection.send(("done", summary))


def _make(
    run: Run,
    connection: Connection,
    out: Path,
    data_dir: str | None,
    loaded: dict[str, datasets.Dataset],
    programs: dict[tuple[Any, ...], Programs],
) -> dict[str, Any]:
    config = run.config
    if config.dataset not in loaded:
        loaded[config.dataset] = datasets.load(config.dataset, data_dir=data_dir)
    dataset = loaded[config.dataset]
    experiment = train.set_up(config, dataset=dataset)
    net = (config.model, dataset.image_shape, dataset.num_classes, config.width)
    if net not in programs:
        programs[net] = Programs(experiment.model)

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
    summary = train.train(experiment, partial, observe, programs=programs[net])
    run_folder.write_json(partial / ENVIRONMENT, environment.describe())
    shutil.rmtree(final, ignore_errors=True)  # it holds no summary, else it were kept
    os.replace(partial, final)
    (out / (run.name + ERROR)).unlink(missing_ok=True)
    return summary


def _write_error(out: Path, run: Run, error: str) -> None:
    path = out / (run.name + ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(error + "\n", encoding="utf-8")


@contextlib.contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """Keeps this thread, and what it starts, to these cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )


def _line(run: Run, summary: dict[str, Any]) -> str:
    if summary["diverged"]:
        return f"{run.name}: diverged after {summary['steps']} steps"
    return (
        f"{run.name}: loss {summary['train_loss']:.4f}, accuracy {summary['test_accuracy']:.1%}, "
        f"{summary['steps']} steps, {summary['seconds']:.1f} s"
    )
