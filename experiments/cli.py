"""The command line: finds the command, and tells in one line how it went wrong."""

import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import UnknownCommandError

from experiments import commands
from experiments.commands import add_modules
from experiments.errors import Interrupted, UserError, how_it_ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 where the user can put it right."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return app()(given or ["compare"]) or 0
    except UnknownCommandError as error:
        unknown = (error.unused_tokens or given)[0]
        known = ", ".join(name for name in error.app or () if not name.startswith("-"))
        return _fail(UserError(f"unknown command {unknown!r}; known commands: {known}."))
    except CycloptsError as error:
        return _fail(UserError(str(error)))
    except (UserError, Interrupted, KeyboardInterrupt) as error:
        return _fail(error)


def app() -> App:
    """The commands, each imported only when it is called."""
    top = App(
        name="python -m experiments",
        help="Without a command: compare.",
        help_format="markdown",
        version_flags=(),
        default_parameter=Parameter(
            negative=(), consume_multiple=(1, None), show_default=_shown, allow_repeating=False
        ),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    add_modules(top, commands)
    return top


def _shown(default: Any) -> Any:
    """A default as one would type it."""
    return " ".join(map(str, default)) if isinstance(default, tuple) else default


def _fail(error: BaseException) -> int:
    status, why = how_it_ends(error)
    print(why, file=sys.stderr)
    return status
