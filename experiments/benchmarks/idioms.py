"""Price of the gradient variance for common ways to come by a weight."""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from cyclopts import Parameter
from rich.console import Console
from rich.progress import track

from experiments.benchmarks import _exact, _idioms, _report
from experiments.benchmarks.moments import Cell, compiled, measure
from experiments.training.step import mean_loss

COLUMNS = ("trace", "diagonal")
CAPTION = """\
Time (temporary memory, compile time) as multiples of what the plain gradient of the mean takes.
ξ, diag: error relative to float64. –: not run, for it needs more memory than --memory."""


def main(
    *,
    idioms: Annotated[tuple[str, ...], _report.choice(_idioms.NAMES)] = _idioms.NAMES,
    options: Annotated[_report.Options, Parameter(name="*")] = _report.Options(),  # noqa: B008
) -> None:
    """Prints the table.

    Args:
      idioms: Ways to come by a weight.
      options: How much to measure.
    """
    options = options.resolved()
    machine = _report.machine("jax", "jaxlib")
    cells: list[tuple[Cell, float]] = []
    progress = Console(stderr=True)
    for name in track(idioms, "bench idioms", console=progress, transient=True):
        net = _idioms.build(name)
        for size in options.batches or net.batch_sizes:
            examples = net.examples(size)
            exact = _exact.moments(net.loss, net.params, examples, [size])
            operands = net.params, jax.tree.map(jnp.asarray, examples)
            # Compiled once to see how long it takes, and again next to what it is compared with.
            plain = compiled(jax.value_and_grad(mean_loss(net.loss)), operands).compile_seconds
            measured = measure(name, net, size, exact[size], COLUMNS, options)
            cells += [(cell, cell.compile_seconds / plain) for cell in measured]
        _report.write_json(
            options.out,
            {
                "machine": machine,
                "cells": [cell._asdict() | {"compile_ratio": ratio} for cell, ratio in cells],
            },
        )
    print(f"{table(cells)}\n\n{CAPTION}\n{machine}")


def table(cells: Sequence[tuple[Cell, float]]) -> str:
    """One row for each idiom and batch size."""
    found = {cell[:3]: (cell, ratio) for cell, ratio in cells}
    rows = []
    for idiom, size in dict.fromkeys(cell[:2] for cell, _ in cells):
        plain, _ = found[idiom, size, "plain"]
        priced = [found[idiom, size, column] for column in COLUMNS]
        rows.append(
            [
                idiom,
                str(size),
                "–" if plain.seconds is None else _report.milliseconds(plain.seconds),
                *(_ratios(cell, ratio) for cell, ratio in priced),
                *(_error(cell) for cell, _ in priced),
            ]
        )
    return _report.markdown(["idiom", "m", "plain", *COLUMNS, "ξ", "diag"], rows)


def _ratios(cell: Cell, compile_ratio: float) -> str:
    time_ratio = "–" if cell.time_ratio is None else f"{cell.time_ratio:.2f}"
    return f"{time_ratio} ({cell.memory_ratio:.2f}, {compile_ratio:.1f})"


def _error(cell: Cell) -> str:
    return "–" if cell.variance_error is None else f"{cell.variance_error:.0e}"
