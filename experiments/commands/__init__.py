"""The commands of `python -m experiments`, one a file, each with its own options and `main`."""

import ast
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Annotated

from cyclopts import App, Parameter

Flag = Annotated[bool, Parameter(show_default=False)]


def add_modules(app: App, package: ModuleType) -> None:
    """Makes a command of `main` in every module of a package whose name does not begin with `_`.

    A module is imported when it is called, for some need time or packages that others do not. Its
    docstring, which is the help, is read from the file.
    """
    for module in pkgutil.iter_modules(package.__path__):
        if not (module.ispkg or module.name.startswith("_")):
            text = Path(package.__path__[0], f"{module.name}.py").read_text("utf-8")
            app.command(
                f"{package.__name__}.{module.name}:main",
                name=module.name,
                help=ast.get_docstring(ast.parse(text)),
            )
