"""Several processes that train as one: they join, agree before the first step, and end together.

What they tell each other goes through the store of JAX's coordinator, which answers while a step
waits for a process that will never come.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # no public name gives the coordinator's store

from experiments.errors import how_it_ends

BEAT_SECONDS = 0.5
SILENT_BEATS = 30  # of ours without one of another process: that one is dead
FAREWELL_BEATS = 20  # for the others to hear why, and for process 0 to end in good order
DAY = 24 * 60 * 60 * 1000  # milliseconds: the watch ends what waits in vain


class DisagreementError(ValueError):
    """The processes would not train one and the same net."""


class Ending(NamedTuple):
    """How a process ends: its exit status, why, unless all is well, and whose fault it is."""

    status: int
    why: str
    process: int


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[jax.sharding.Mesh]:
    """Joins the other processes for as long as the block lasts; what is None is found out.

    If a process fails in its block, dies or is cut off, all end within seconds, and each prints
    why. Left to itself, a step waits for ever for a process that is gone. Only if process 0 is
    killed outright is it JAX that ends the others, by SIGABRT or status 1: with the store goes
    the connection whose loss JAX's client answers so, before any thread of ours hears of it,
    and the callback that it takes for this cannot be written in Python.

    Returns:
      One axis over all devices of all processes.

    Raises:
      RuntimeError: Not all processes came, or one has another's number.
      ValueError: It cannot be found out where they meet.
    """
    jax.distributed.initialize(coordinator, num_processes, process_id)
    state = distributed.global_state
    watch = _Watch(state.client, state.process_id, state.num_processes)
    try:
        yield jax.make_mesh((jax.device_count(),), ("data",))
    except BaseException as error:
        watch.fail(error)
    watch.finish()


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Returns once all processes have come here with equal values; each `what` is asked once.

    Args:
      what: What the values are of, for the message.
      values: By name, for JSON.

    Raises:
      DisagreementError: They are not equal; the message says on which processes, on all of them.
    """
    if jax.process_count() == 1:
        return
    client: Any = distributed.global_state.client
    client.key_value_set(f"agree/{what}/{jax.process_index()}", json.dumps(values))
    first, *others = (
        json.loads(client.blocking_key_value_get(f"agree/{what}/{index}", DAY))
        for index in range(jax.process_count())
    )
    differences = [
        f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {index}"
        for index, other in enumerate(others, 1)
        for name in dict.fromkeys((*first, *other))
        if first.get(name) != other.get(name)
    ]
    if differences:
        raise DisagreementError(f"the processes differ in {what}: {'; '.join(differences)}.")


class _Watch:
    """A thread that tells the others that this process lives, and ends it if one of them failed.

    Beats are counted, not timed: processes that were all suspended do not take each other for dead.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index = client, index
        self._others = [other for other in range(count) if other != index]
        self._beat = 0
        self._heard = dict.fromkeys(self._others, ("", 0))  # the last beat, and at which of ours
        self._endings: dict[int, Ending] = {}
        self._trouble_since: int | None = None  # a beat of ours
        self._raised: tuple[BaseException, int] | None = None  # and at which of our beats
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Returns once all processes have ended well."""
        self._tell(Ending(0, "", self._index))
        while set(self._others) - set(self._endings):
            time.sleep(BEAT_SECONDS / 5)
        self._finished.set()
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Has the thread end this process: with the error, or with what went wrong elsewhere."""
        self._raised = error, self._beat
        while True:
            self._thread.join()

    def _run(self) -> None:
        while not self._finished.wait(BEAT_SECONDS):
            self._exchange()
            if (ending := self._verdict()) is not None:
                self._exit(ending)

    def _exchange(self) -> None:
        try:
            self._client.key_value_set(f"watch/beat/{self._index}", str(self._beat), True)
            told = dict(self._client.key_value_dir_get("watch/"))
        except Exception as error:  # whatever a store that is gone raises
            self._endings[0] = Ending(1, f"error: it is gone: {error}", 0)
            return
        self._beat += 1
        for other in self._others:
            beat = told.get(f"watch/beat/{other}", "")
            if beat != self._heard[other][0]:
                self._heard[other] = beat, self._beat
            elif self._beat - self._heard[other][1] >= SILENT_BEATS:
                silence = f"error: it died, or gave no sign for {SILENT_BEATS * BEAT_SECONDS:g} s."
                self._endings.setdefault(other, Ending(1, silence, other))
            if ending := told.get(f"watch/ending/{other}"):
                self._endings[other] = Ending(*json.loads(ending))

    def _verdict(self) -> Ending | None:
        """How this process must end now, if it must."""
        trouble = next((ending for ending in self._endings.values() if ending.why), None)
        if trouble is not None:
            self._trouble_since = self._trouble_since or self._beat
            # What process 0 writes in the background may yet become whole.
            patience = FAREWELL_BEATS if self._index == 0 and self._raised is None else 0
            return trouble if self._beat >= self._trouble_since + patience else None
        if self._raised is None:
            return None
        # Every process raises if one of them is gone in a step. What was raised here is the reason
        # if all others live, who would have told of their own.
        error, before = self._raised
        if any(at < before + 2 for _, at in self._heard.values()):
            return None
        status, why = how_it_ends(error)
        return Ending(status, why, self._index)

    def _tell(self, ending: Ending) -> None:
        self._client.key_value_set(f"watch/ending/{self._index}", json.dumps(ending), True)

    def _exit(self, ending: Ending) -> NoReturn:
        """Prints why, and exits at once: JAX would first wait for the others for minutes."""
        try:
            whose = "" if ending.process == self._index else f"process {ending.process}: "
            with contextlib.suppress(OSError):  # the terminal may be gone, or the disk full
                print(f"{whose}{ending.why}", file=sys.stderr, flush=True)
                sys.stdout.flush()
            with contextlib.suppress(Exception):  # the store may be gone
                self._tell(ending)
            for _ in range(FAREWELL_BEATS if self._index == 0 else 0):  # with it goes the store
                self._exchange()
                if not set(self._others) - set(self._endings):
                    break
                time.sleep(BEAT_SECONDS)
        finally:
            os._exit(ending.status)
