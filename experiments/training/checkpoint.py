"""Checkpoints of a run: Orbax writes them, a digest tells the whole from the damaged."""

import hashlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from cabs_jax.statistics import PyTree
from experiments.errors import Interrupted
from experiments.escape import printable

FOLDER = "checkpoints"
ARRAYS, PROGRESS, DIGEST = "arrays", "progress", "digest"

UNREADABLE = "[\\*?"  # Orbax writes below folders whose names hold these, but reads by patterns


class Schedule(NamedTuple):
    """When to write a checkpoint, whichever comes first, and how many to keep."""

    every_steps: int | None = None
    every_minutes: float = 5.0
    keep: int = 3

    def checked(self) -> Self:
        """Itself; raises ValueError unless all are positive."""
        for name, value in self._asdict().items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        return self


def check_path(folder: Path) -> None:
    """Raises ValueError if checkpoints could be written below `folder`, but not read."""
    for character in UNREADABLE:
        if character in str(folder.absolute()):
            raise ValueError(
                f"checkpoints below {folder} could not be read again, for {character!r} is in its "
                "path; name another folder."
            )


class Checkpoints:
    """The checkpoints of one run, as a context within which signals wait for one.

    SIGINT and SIGTERM are noted; the next step is then `due`, and `stop_if_asked` raises. A second
    signal acts at once, as it would have without us.

    Of several processes the first alone reads and writes, and sends the others what it read.

    Args:
      folder: Where they lie; made when needed. None on all processes but the first.
      schedule: When they are due.

    Raises:
      ValueError: What is written below `folder` could not be read.
    """

    def __init__(self, folder: Path | None, schedule: Schedule = Schedule()):  # noqa: B008
        if folder is not None:
            check_path(folder)
        self._folder = folder
        self._was_read_back = False
        self._schedule = schedule.checked()
        self._signals: list[int] = []
        self._lazy_manager: Any = None
        self._last_time = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether the state after `step`, which counts from 1, should be saved."""
        if self._folder is None:
            return False
        steps, seconds = self._schedule.every_steps, 60 * self._schedule.every_minutes
        return (
            bool(self._signals)
            or (steps is not None and step % steps == 0)
            or time.perf_counter() - self._last_time >= seconds
        )

    def save(self, step: int, arrays: PyTree, progress: Mapping[str, Any]) -> None:
        """Copies `arrays`, which may then be donated, and writes them in the background.

        Args:
          step: Number of the checkpoint.
          arrays: A pytree of arrays that this process holds whole.
          progress: What else is needed to continue, for JSON.

        Raises:
          OSError: This checkpoint or the one before it cannot be written, or the first that this
        process writes, which it waits for, cannot be read back.
        """
        import orbax.checkpoint as ocp

        if self._folder is None or step in self.steps():
            return
        # On CPU a view would be of memory that the next step reuses.
        copies = jax.tree.map(lambda x: np.array(x, copy=True), arrays)
        signed = {**progress, DIGEST: _digest(copies, progress)}
        with _as_os_error(f"cannot write the checkpoint of step {step} in {self._folder}"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        ARRAYS: ocp.args.StandardSave(copies),
                        PROGRESS: ocp.args.JsonSave(signed),
                    }
                ),
            )
        if not self._was_read_back:
            self.wait()
            with _as_os_error(f"cannot read back the checkpoint of step {step} in {self._folder}"):
                self._read(step, copies)
            self._was_read_back = True
        self._last_time = time.perf_counter()

    def steps(self) -> list[int]:
        """The steps whose checkpoints are on disk, whole or damaged."""
        found: list[int] = self._manager.all_steps()
        return found

    def stop_if_asked(self, step: int) -> None:
        """Raises Interrupted if a signal came, once the checkpoint of `step` is on disk."""
        if self._signals:
            self.wait()
            raise Interrupted(
                self._signals[0],
                f"after step {step}, whose checkpoint is in {self._folder}; --resume continues.",
            )

    def wait(self) -> None:
        """Returns once everything is on disk.

        Raises:
          OSError: It cannot be written.
        """
        if self._lazy_manager is not None:
            with _as_os_error(f"cannot write a checkpoint in {self._folder}"):
                self._lazy_manager.wait_until_finished()

    def restore(
        self, arrays: PyTree, last: int | None = None
    ) -> tuple[PyTree, dict[str, Any]] | None:
        """The newest whole checkpoint; damaged ones are named on stderr and deleted.

        Args:
          arrays: A pytree of the structure, shapes and dtypes that were saved.
          last: Leaves out the checkpoints of later steps.

        Returns:
          The saved arrays and progress, or None if there is no checkpoint.

        Raises:
          OSError: There are checkpoints, but all are damaged.
        """
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arrays)
        found = None if self._folder is None else self._newest_whole(template, last)
        return found if jax.process_count() == 1 else _from_first_process(found, template)

    def __enter__(self) -> Self:
        self._handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in self._handlers:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore_handlers()
        if self._lazy_manager is not None:
            with _as_os_error(f"cannot write a checkpoint in {self._folder}"):
                self._lazy_manager.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        self._signals.append(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def _manager(self) -> Any:
        if self._lazy_manager is None:
            import orbax.checkpoint as ocp  # takes a second, which not every run needs

            first_alone = ocp.options.MultiprocessingOptions(
                primary_host=0,
                active_processes={0} if jax.process_count() > 1 else None,
                barrier_sync_key_prefix="first" if jax.process_count() > 1 else None,
            )
            assert self._folder is not None
            logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises too
            with _as_os_error(f"cannot use {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lazy_manager = ocp.CheckpointManager(
                    self._folder.absolute(),
                    options=ocp.CheckpointManagerOptions(
                        create=False,
                        max_to_keep=self._schedule.keep,
                        cleanup_tmp_directories=True,
                        multiprocessing_options=first_alone,
                    ),
                )
        return self._lazy_manager

    def _read(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The checkpoint of `step`; raises anything if it is damaged."""
        import orbax.checkpoint as ocp

        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    ARRAYS: ocp.args.StandardRestore(template),
                    PROGRESS: ocp.args.JsonRestore(),
                }
            ),
        )
        progress, arrays = saved[PROGRESS], saved[ARRAYS]
        if progress.pop(DIGEST) != _digest(arrays, progress):
            raise ValueError("its digest does not match.")
        return arrays, progress

    def _newest_whole(
        self, template: PyTree, last: int | None
    ) -> tuple[PyTree, dict[str, Any]] | None:
        assert self._folder is not None
        if not self._folder.exists():
            return None
        steps = sorted((n for n in self.steps() if last is None or n <= last), reverse=True)
        for number, step in enumerate(steps):
            try:
                arrays, progress = self._read(step, template)
            except Exception as error:  # whatever the readers of damaged files raise
                reason = printable(error)[:200]
                damaged = printable(self._folder / str(step))
                print(f"damaged checkpoint {damaged}: {reason}", file=sys.stderr)
                continue
            for newer in steps[:number]:
                self._manager.delete(newer)
            return arrays, progress
        if steps:
            raise OSError(
                f"none of the checkpoints in {self._folder} can be read, for they are damaged or "
                "another version wrote them: resume with that version, or remove that folder to "
                "start from the first step."
            )
        return None


def _digest(arrays: PyTree, progress: Mapping[str, Any]) -> str:
    """Hash of everything that was saved, taken before it was written."""
    digest = hashlib.blake2b(json.dumps(progress, sort_keys=True).encode(), digest_size=16)
    for leaf in jax.tree.leaves(arrays):
        digest.update(repr((leaf.shape, leaf.dtype.name)).encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _from_first_process(
    found: tuple[PyTree, dict[str, Any]] | None, template: PyTree
) -> tuple[PyTree, dict[str, Any]] | None:
    """What the first process found, on all processes."""
    arrays, progress = (template, None) if found is None else found
    text = np.frombuffer(json.dumps(progress).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    if jax.process_index():
        text = np.zeros(length, np.uint8)
    progress = json.loads(bytes(multihost_utils.broadcast_one_to_all(text)))
    if progress is None:
        return None
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays)), progress


@contextmanager
def _as_os_error(what: str) -> Iterator[None]:
    """Orbax and its writers raise errors of many types for a disk that is full or read-only."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{what}: {error}") from error
