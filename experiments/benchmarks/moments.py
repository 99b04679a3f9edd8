"""Price of the gradient variance: ratios to the plain gradient of the mean loss."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from cyclopts import Parameter
from rich.console import Console
from rich.progress import track

import cabs_jax
from cabs_jax.moments.flops import flops
from cabs_jax.statistics import PyTree
from experiments.benchmarks import _exact, _nets, _report, _timing
from experiments.training.step import mean_loss

SUBSAMPLE = 32
COLUMNS: dict[str, dict[str, Any]] = {
    "per_example": {"method": "per_example"},
    "trace": {"method": "factored"},
    "diagonal": {"method": "factored", "variance": "diagonal"},
    "subsample": {"method": "factored", "subsample": SUBSAMPLE},
}
CAPTION = f"""\
Time (temporary memory, flops) as multiples of what the plain gradient of the mean loss takes.
subsample: the variance of {SUBSAMPLE} examples. ξ, ḡ, diag: error relative to float64.
–: not run, for it needs more memory than --memory, or the batch is no larger than {SUBSAMPLE}."""


class Executable(NamedTuple):
    """A compiled function of (params, batch) and what the compiler says it needs."""

    run: Callable[[PyTree, PyTree], Any]
    temporary_bytes: int
    flops: int
    compile_seconds: float


class Cell(NamedTuple):
    """What was measured of one way to compute one net's moments at one batch size.

    Attributes:
      model: Name of the net.
      batch_size: Number of examples.
      column: One of `COLUMNS`, or "plain".
      seconds: Median time of a call; None if it was not run.
      time_ratio: Median ratio of the time to that of a plain gradient measured next to it.
      rounds: Number of such pairs.
      temporary_bytes: Temporary memory, by the compiler's analysis.
      memory_ratio: Ratio to the plain gradient's.
      flops: Operations, the bodies of loops counted as often as they run.
      flops_ratio: Ratio to the plain gradient's.
      compile_seconds: Time to trace and compile.
      variance_error: ‖error‖/‖exact‖ of the variance; of a subsample, relative to the whole batch.
      mean_error: ‖error‖/‖exact‖ of the mean gradient.
    """

    model: str
    batch_size: int
    column: str
    seconds: float | None
    time_ratio: float | None
    rounds: int
    temporary_bytes: int
    memory_ratio: float
    flops: int
    flops_ratio: float
    compile_seconds: float
    variance_error: float | None
    mean_error: float | None


def main(
    *,
    models: Annotated[tuple[str, ...], _report.choice(_nets.NAMES)] = tuple(_nets.NAMES),
    columns: Annotated[tuple[str, ...], _report.choice(COLUMNS)] = tuple(COLUMNS),
    options: Annotated[_report.Options, Parameter(name="*")] = _report.Options(),  # noqa: B008
) -> None:
    """Prints the table.

    Args:
      models: Nets.
      columns: Ways to compute the moments.
      options: How much to measure.
    """
    options = options.resolved()
    nets = {name: _nets.build(name) for name in models}
    sizes = {name: options.batches or net.batch_sizes for name, net in nets.items()}
    progress, cells = Console(stderr=True), []
    machine = _report.machine("jax", "jaxlib")
    exact = {
        name: _exact.moments(net.loss, net.params, net.examples(max(sizes[name])), sizes[name])
        for name, net in track(nets.items(), "float64", console=progress, transient=True)
    }
    pairs = [(name, size) for name in nets for size in sizes[name]]
    for name, size in track(pairs, "bench moments", console=progress, transient=True):
        cells += measure(name, nets[name], size, exact[name][size], columns, options)
        _report.write_json(
            options.out, {"machine": machine, "cells": [cell._asdict() for cell in cells]}
        )
    print(f"{table(cells, columns)}\n\n{CAPTION}\n{machine}\n\n{summary(cells)}")


def measure(
    model: str,
    net: _nets.Net,
    batch_size: int,
    exact: _exact.Exact,
    columns: Sequence[str],
    options: _report.Options,
) -> list[Cell]:
    """Measures the plain gradient and every column."""
    batch = jax.tree.map(jnp.asarray, net.examples(batch_size))
    operands = net.params, batch
    plain = compiled(jax.value_and_grad(mean_loss(net.loss)), operands)
    plain_seconds: list[float] = []
    cells: list[Cell] = []
    for column in columns:
        if column == "subsample" and batch_size <= SUBSAMPLE:
            continue
        program = compiled(cabs_jax.gradient_moments(net.loss, **COLUMNS[column]), operands)
        seconds: Mapping[str, list[float]] = {"plain": [], column: []}
        errors: tuple[float | None, float | None] = (None, None)
        if program.temporary_bytes <= options.memory * 2**30:
            contenders = {"plain": on(plain, operands), column: on(program, operands)}
            errors = _errors(contenders[column](), exact, column)
            seconds = _timing.alternate(contenders, options.repeats, options.seconds)
        plain_seconds += seconds["plain"]
        cells.append(_cell((model, batch_size, column), program, plain, seconds, errors))
    alone = {"plain": plain_seconds}
    return [_cell((model, batch_size, "plain"), plain, plain, alone, (None, None)), *cells]


def compiled(function: Callable[..., Any], operands: tuple[PyTree, PyTree]) -> Executable:
    """Compiles `function(*operands)`."""
    started = time.perf_counter()
    run = jax.jit(function).lower(*operands).compile()
    seconds = time.perf_counter() - started
    memory: Any = run.memory_analysis()
    return Executable(run, memory.temp_size_in_bytes, flops(function, *operands), seconds)


def on(program: Executable, operands: tuple[PyTree, PyTree]) -> Callable[[], Any]:
    """A call of a program that waits for its result."""
    return lambda: jax.block_until_ready(program.run(*operands))


def _errors(
    moments: cabs_jax.GradientMoments, exact: _exact.Exact, column: str
) -> tuple[float, float]:
    variance = exact.diagonal if column == "diagonal" else exact.trace
    return (
        _exact.relative_error(moments.variance, variance),
        _exact.relative_error(moments.mean, exact.mean),
    )


def _cell(
    place: tuple[str, int, str],
    program: Executable,
    plain: Executable,
    seconds: Mapping[str, list[float]],
    errors: tuple[float | None, float | None],
) -> Cell:
    own, reference = seconds[place[2]], seconds["plain"]
    return Cell(
        *place,
        statistics.median(own) if own else None,
        _timing.median_ratio(own, reference) if own else None,
        len(own),
        program.temporary_bytes,
        program.temporary_bytes / plain.temporary_bytes,
        program.flops,
        program.flops / plain.flops,
        program.compile_seconds,
        *errors,
    )


def table(cells: Sequence[Cell], columns: Sequence[str]) -> str:
    """One row for each net and batch size."""
    found = {cell[:3]: cell for cell in cells}
    header = ["net", "m", "plain", *columns, "ξ", "diag", "ḡ"]
    rows = []
    for model, size in dict.fromkeys(cell[:2] for cell in cells):
        plain = found[model, size, "plain"]
        row = [found.get((model, size, column)) for column in columns]
        errors = {cell.column: cell.variance_error for cell in row if cell}
        mean_errors = [cell.mean_error for cell in row if cell and cell.mean_error is not None]
        rows.append(
            [
                f"{model}",
                str(size),
                "–" if plain.seconds is None else _report.milliseconds(plain.seconds),
                *map(_ratios, row),
                _error(errors.get("trace")),
                _error(errors.get("diagonal")),
                _error(max(mean_errors, default=None)),
            ]
        )
    return _report.markdown(header, rows)


def summary(cells: Sequence[Cell]) -> str:
    """What the factored trace costs at worst and on average."""
    trace = [cell for cell in cells if cell.column == "trace" and cell.time_ratio]
    if not trace:
        return "trace: not measured"
    times = [cell.time_ratio for cell in trace if cell.time_ratio]
    memory = [cell.memory_ratio for cell in trace if cell.batch_size >= 128]
    return (
        f"trace: time {statistics.geometric_mean(times):.2f}× (geometric mean), at most"
        f" {max(times):.2f}×; temporary memory at batch ≥ 128 at most"
        f" {max(memory, default=math.nan):.2f}×"
    )


def _ratios(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    time_ratio = "–" if cell.time_ratio is None else f"{cell.time_ratio:.2f}"
    return f"{time_ratio} ({cell.memory_ratio:.2f}, {cell.flops_ratio:.2f})"


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.0e}"
