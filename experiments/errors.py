"""How a command ends when it cannot go on: the command line tells these in one line."""

import contextlib
import signal
import traceback
from collections.abc import Iterator

from experiments.escape import printable


class UserError(Exception):
    """Something that the user can put right, said in one line."""


class Interrupted(Exception):  # noqa: N818 (like KeyboardInterrupt, it is no error)
    """A signal asked a command to end, and it did so in good order.

    Args:
      number: The signal's.
      where: How far the command had come, and how it goes on.

    Attributes:
      signal: The signal's number.
    """

    def __init__(self, number: int, where: str):
        super().__init__(f"{signal.Signals(number).name} {where}")
        self.signal = number


def how_it_ends(error: BaseException) -> tuple[int, str]:
    r"""The exit status of a command that raised `error`, and what it prints last.

    >>> how_it_ends(UserError("the disk\nis full."))
    (2, 'error: the disk is full.')
    """
    match error:
        case UserError():
            return 2, f"error: {printable(error)}"
        case Interrupted():
            return 128 + error.signal, f"interrupted by {printable(error)}"
        case KeyboardInterrupt():
            return 130, "interrupted; what was written stays"
    return 1, "".join(traceback.format_exception(error)).rstrip()


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, raised for what the user gave, into `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error
