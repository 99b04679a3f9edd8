"""The processes of a sweep, each on its own cores, and which of them makes which run."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from experiments import environment
from experiments.escape import printable
from experiments.sweeps.plan import Run
from experiments.sweeps.worker import work, write_error


class _Worker:
    """A process, the run that it is at, and its bar."""

    def __init__(self, out: Path, data_dir: str | None, cores: set[int], bar: TaskID):
        self.cores, self.bar = cores, bar
        self.run: Run | None = None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, out, data_dir), daemon=True)
        with _on_cores(cores):  # inherited, so that all threads of the process keep to them
            self.process.start()
        theirs.close()


class Pool:
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

    def results(self, overall: TaskID) -> Iterator[tuple[Run, str, Any]]:
        """Each run as it ends: done with its summary, failed or made elsewhere with the reason."""
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
                    write_error(self._out, run, content)
                    self._workers.remove(worker)
                    self._start(worker.cores, worker.bar)
                if kind == "progress":
                    fraction, note = content
                    self._bars.update(worker.bar, completed=fraction, note=note)
                else:
                    fraction = 1.0
                    yield run, kind, content
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
            self._bars.update(
                worker.bar, description=printable(worker.run.name), completed=0, note=""
            )
        with contextlib.suppress(BrokenPipeError):  # it died: the pipe's end will tell
            worker.connection.send(worker.run)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            if exception[0] is not None:
                worker.process.terminate()
            worker.process.join()


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
