"""One process at a time writes a folder."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class InUseError(OSError):
    """Another process writes there; the message says which."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of a folder, and gives what checks that it is still held.

    The lock is the system's, which drops it when its process dies: what a killed run left behind
    blocks nobody, and a suspended run keeps it.

    Args:
      path: The lock's file, which exists while it is held, and then says who holds it.

    Raises:
      InUseError: Another process holds it.
      OSError: The file cannot be written. The check raises it when the file was removed or
        replaced, as with its whole folder.
    """
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise InUseError(
            f"{path} is held by {_read(path)}: stop that process, or wait for it."
        ) from None
    ours = None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", "utf-8")
        ours = _identity(path)

        def check() -> None:
            if _identity(path) != ours:
                raise OSError(
                    f"{path.parent} was removed, or taken by {_read(path)}, while it was written."
                )

        yield check
    finally:
        if ours is not None and _identity(path) == ours:
            path.unlink(missing_ok=True)  # while it is held: nobody else's lock goes
        lock.release()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", errors="replace")[:200] or "a process that just began"
    return "somebody"
