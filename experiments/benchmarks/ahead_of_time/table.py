"""The tables: each program's costs as multiples of the plain step's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks import _report
from experiments.benchmarks.ahead_of_time.costs import Costs, Hot
from experiments.benchmarks.ahead_of_time.targets import Target


class Cell(NamedTuple):
    """One program: where it belongs, and its costs."""

    target: str
    net: str
    batch_size: int
    column: str
    costs: Costs

    @property
    def place(self) -> tuple[str, str, int]:
        """What it shares with the plain step that it is compared to."""
        return self[:3]

    def to_json(self) -> dict[str, Any]:
        """Its fields, the costs a dictionary."""
        return {**dict(zip(self._fields, self, strict=True)), "costs": self.costs._asdict()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Cell":
        """From what `to_json` gives, read back from JSON."""
        costs = dict(fields["costs"])
        costs["hottest"] = [Hot(*hot) for hot in costs["hottest"]]
        return cls(**{**fields, "costs": Costs(**costs)})


RATIOS = ("seconds", "kernels", "memory_bytes", "temporary_bytes", "flops", "compile_seconds")


def ratios(cells: Sequence[Cell]) -> dict[tuple[str, str, int, str], dict[str, float]]:
    """Costs as multiples of those of the plain step of the same net, batch size and target."""
    plain = {cell.place: cell.costs for cell in cells if cell.column == "plain"}
    return {
        (*cell.place, cell.column): {
            name: _ratio(getattr(cell.costs, name), getattr(plain[cell.place], name))
            for name in RATIOS
        }
        for cell in cells
        if cell.place in plain
    }


def table(cells: Sequence[Cell], target: Target) -> str:
    """One row for each program; the plain step's in units, the others' as multiples of it."""
    times = ("cycles", "ours") if target.platform == "tpu" else ("time",)
    header = ["net", "m", "program", *times, "kernels", "memory", "temporary"]
    header += ["operations", "compiled in", "sent and received"]
    multiples = ratios(cells)
    rows = []
    for cell in cells:
        costs, multiple = cell.costs, multiples.get((*cell.place, cell.column))
        if cell.column == "plain" or multiple is None:
            shown = [
                _cycles(costs.seconds * target.hertz)
                if target.platform == "tpu"
                else _report.milliseconds(costs.seconds),
                f"{costs.kernels}",
                _size(costs.memory_bytes, "B"),
                _size(costs.temporary_bytes, "B"),
                _size(costs.flops, ""),
                f"{costs.compile_seconds:.1f} s",
            ]
        else:
            shown = [f"{multiple[name]:.2f}×" for name in RATIOS]
        if target.platform == "tpu":
            shown.insert(1, f"{_ratio(costs.modelled_seconds, costs.seconds):.0%}")
        sent = ", ".join(f"{k} {_size(n, 'B')}" for k, n in sorted(costs.collective_bytes.items()))
        rows.append([cell.net, str(cell.batch_size), cell.column, *shown, sent or "–"])
    return _report.markdown(header, rows)


def hottest(cells: Sequence[Cell], number: int) -> str:
    """Where each program's time is, and where it is more or less than the plain step's.

    First the longest kernels, as shares of the program's time and multiples of the plain step's;
    then the operations that it spends most more on than the plain step.
    """
    plain = {cell.place: cell.costs for cell in cells if cell.column == "plain"}
    lines = []
    for cell in cells:
        reference = plain.get(cell.place, cell.costs)
        lines.append(f"{cell.net} {cell.batch_size} {cell.column}")
        if excess := _excess(cell.costs, reference, number):
            lines.append(f"  over plain: {excess}")
        for hot in cell.costs.hottest[:number]:
            share = _ratio(hot.seconds, cell.costs.seconds)
            times = f"{share:4.0%} = {_ratio(hot.seconds, reference.seconds):.2f}× plain"
            source = hot.source.replace("closed_call/", "")[-90:]
            lines.append(f"  {times}  ×{hot.runs} {hot.name}  {source}")
    return "\n".join(lines)


def _excess(costs: Costs, plain: Costs, number: int) -> str:
    """The operations with the largest differences, as multiples of the plain step's time."""
    names = {*costs.operations, *plain.operations}
    more = {n: costs.operations.get(n, 0.0) - plain.operations.get(n, 0.0) for n in names}
    largest = sorted(names, key=lambda n: (-abs(more[n]), n))[:number]
    shown = [(n, _ratio(more[n], plain.seconds)) for n in largest]
    return ", ".join(f"{n} {share:+.2f}" for n, share in shown if abs(share) >= 0.005)


def _ratio(value: float, reference: float) -> float:
    if reference:
        return value / reference
    return math.inf if value else 1.0


def _cycles(number: float) -> str:
    return _size(number, "")


def _size(number: float, unit: str) -> str:
    """A number with three digits and a prefix.

    >>> _size(26_780_696, "B"), _size(512, "B"), _size(0, "")
    ('26.8 MB', '512 B', '0')
    """
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()
