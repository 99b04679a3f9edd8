"""Time of the gradient variance in cabs_jax, BackPACK and Opacus, on the same nets and batches."""

import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from cyclopts import Parameter
from rich.console import Console
from rich.progress import track

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments.benchmarks import _exact, _nets, _report, _timing
from experiments.benchmarks.moments import compiled, on
from experiments.errors import UserError
from experiments.training.step import mean_loss

NETS = ("mnist_2c2d", "cifar10_2c3d", "mlp")
PLAIN = {"cabs_jax": "JAX", "BackPACK": "PyTorch", "Opacus": "PyTorch"}
CAPTION = """\
Milliseconds, and as a multiple of the plain gradient in the same framework. norms, trace: ξ alone;
squares, variance, diagonal: for every parameter. ξ: largest error of any of them relative to
float64. –: not run, for it needs more memory than --memory."""


class Cell(NamedTuple):
    """What was measured of one contender on one net at one batch size.

    Attributes:
      model: Name of the net.
      batch_size: Number of examples.
      contender: Who computes.
      seconds: Median time of a step up to the gradient; None if it was not run.
      time_ratio: Median ratio to the plain gradient in the same framework, measured in turn.
      rounds: Number of turns.
      variance_error: Relative to float64; None where no variance is computed.
    """

    model: str
    batch_size: int
    contender: str
    seconds: float | None
    time_ratio: float | None
    rounds: int
    variance_error: float | None


def main(
    *,
    models: Annotated[tuple[str, ...], _report.choice(NETS)] = NETS,
    options: Annotated[_report.Options, Parameter(name="*")] = _report.Options(),  # noqa: B008
) -> None:
    """Prints the table.

    Args:
      models: Nets.
      options: How much to measure.
    """
    options = options.resolved()
    missing = [n for n in ("torch", "backpack", "opacus") if not importlib.util.find_spec(n)]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'cabs_jax[peers]'.")
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    machine = _report.machine("jax", "torch", "backpack-for-pytorch", "opacus")
    progress, cells = Console(stderr=True), []
    sizes = options.batches or (16, 128, 512)
    pairs = [(name, size) for name in models for size in sizes]
    for name, size in track(pairs, "bench peers", console=progress, transient=True):
        cells += measure(name, size, options)
        _report.write_json(
            options.out, {"machine": machine, "cells": [cell._asdict() for cell in cells]}
        )
    print(f"{table(cells)}\n\n{CAPTION}\n{machine}")


def measure(model: str, batch_size: int, options: _report.Options) -> list[Cell]:
    """Measures all contenders in turn."""
    from experiments.benchmarks import _torch

    net = _nets.build(model)
    examples = net.examples(batch_size)
    theirs = _torch.contenders(model, net.params, examples)
    contenders = {**ours(net, examples), **theirs}
    entries = sum(leaf.size for leaf in jax.tree.leaves(net.params))
    skipped = {"Opacus per example"} if 4 * entries * batch_size > options.memory * 2**30 else set()
    running = {name: call for name, call in contenders.items() if name not in skipped}
    exact = _exact.moments(net.loss, net.params, examples, [batch_size])[batch_size].trace
    errors = {
        name: abs(total(call()) / exact - 1)
        for name, call in running.items()
        if name not in PLAIN.values()
    }
    seconds = _timing.alternate(running, options.repeats, options.seconds * len(running))
    return [_cell((model, batch_size, name), seconds, errors.get(name)) for name in contenders]


def ours(net: _nets.Net, examples: PyTree) -> dict[str, Callable[[], Any]]:
    """The plain gradient in JAX, and the variance by this package."""
    operands = net.params, jax.tree.map(jnp.asarray, examples)

    def variance(kind: Any) -> Callable[[], Any]:
        function = cabs_jax.gradient_moments(net.loss, variance=kind)
        return on(compiled(function, operands), operands)

    return {
        "JAX": on(compiled(jax.value_and_grad(mean_loss(net.loss)), operands), operands),
        "cabs_jax trace": variance("trace"),
        "cabs_jax diagonal": variance("diagonal"),
    }


def total(result: Any) -> float:
    """The trace that a contender found."""
    variance = result.variance if isinstance(result, cabs_jax.GradientMoments) else result
    return sum(float(x.sum()) for x in jax.tree.leaves(variance))


def table(cells: Sequence[Cell]) -> str:
    """One row for each net and batch size."""
    found = {cell[:3]: cell for cell in cells}
    contenders = list(dict.fromkeys(cell.contender for cell in cells))
    rows = []
    for model, size in dict.fromkeys(cell[:2] for cell in cells):
        row = [found[model, size, contender] for contender in contenders]
        worst = max(cell.variance_error for cell in row if cell.variance_error is not None)
        rows.append([model, str(size), *map(_text, row), f"{worst:.0e}"])
    return _report.markdown(["net", "m", *contenders, "ξ"], rows)


def _cell(
    place: tuple[str, int, str], seconds: Mapping[str, list[float]], error: float | None
) -> Cell:
    contender = place[2]
    own = seconds.get(contender)
    if own is None:
        return Cell(*place, None, None, 0, None)
    plain = PLAIN.get(contender.split()[0], contender)
    ratio = _timing.median_ratio(own, seconds[plain])
    return Cell(*place, statistics.median(own), ratio, len(own), error)


def _text(cell: Cell) -> str:
    if cell.seconds is None:
        return "–"
    time = _report.milliseconds(cell.seconds)
    return time if cell.contender in PLAIN.values() else f"{time} ({cell.time_ratio:.2f})"
