"""Errors that the command line tells in one line."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something that the user can put right, said in one line."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, raised for what the user gave, into `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error
