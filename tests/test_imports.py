"""Which module imports which: never in a circle, and rooms only those below them."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("cabs_jax", "experiments")
    for path in (ROOT / package).rglob("*.py")
}
DOWNWARDS = (
    "experiments.cli",
    "experiments.commands",
    "experiments.report",
    "experiments.sweeps",
    "experiments.training",
    "experiments.datasets",
    "cabs_jax",
)


def imported(name):
    """The modules of ours that a module names, wherever in it the import stands."""
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


IMPORTS = {name: set(imported(name)) for name in FILES}


def test_no_module_imports_itself_through_others():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_room_imports_only_rooms_below_it():
    def floor(name):
        return next(
            (i for i, room in enumerate(DOWNWARDS) if f"{name}.".startswith(f"{room}.")), None
        )

    floors = {name: floor(name) for name in FILES if floor(name) is not None}
    upwards = [
        f"{name} imports {other}"
        for name in floors
        for other in IMPORTS[name] & floors.keys()
        if floors[other] < floors[name]
    ]
    assert not upwards


def test_the_library_knows_nothing_of_the_experiments():
    for name, others in IMPORTS.items():
        if name.startswith("cabs_jax"):
            assert not [other for other in others if other.startswith("experiments")], name
