"""What a compiled program sends between devices, read off its HLO."""

import math
import re
from typing import Any, NamedTuple

OPERATIONS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_INSTRUCTION = re.compile(rf"= (.+?) ({'|'.join(OPERATIONS)})(?:-start)?\(")
_DEFINITION = re.compile(r"(%[\w.-]+) = (.+?) [\w-]+\(")
_OPERAND = re.compile(r"%[\w.-]+")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")  # f8e4m3fn[2,3] too


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      operation: Its name in HLO, such as "all-reduce".
      arrays: Bytes of each array that a device holds after it (before it for "reduce-scatter",
        whose results are shards).
    """

    operation: str
    arrays: tuple[int, ...]


def collectives(compiled: Any) -> list[Collective]:
    """The collective operations of a `jax.stages.Compiled`; one inside a loop is counted once."""
    return parse(compiled.as_text())


def parse(hlo: str) -> list[Collective]:
    """The collective operations in the text of an HLO module.

    >>> parse("%r = (f32[2,3]{1,0}, bf16[]) all-reduce(%a, %b), to_apply=%add")
    [Collective(operation='all-reduce', arrays=(24, 2))]
    """
    found: list[Collective] = []
    results = dict(_DEFINITION.findall(hlo))
    for line in hlo.splitlines():
        if match := _INSTRUCTION.search(line):
            result, operation = match.groups()
            if operation == "reduce-scatter":
                operands = line[match.end() :].partition(")")[0]
                # Their types are not always repeated where they are used.
                known = [results.get(name, "") for name in _OPERAND.findall(operands)]
                result = operands if _ARRAY.search(operands) else " ".join(known)
            found.append(Collective(operation, tuple(map(_bytes, _ARRAY.findall(result)))))
    return found


def _bytes(array: tuple[str, str, str]) -> int:
    _, bits, dimensions = array
    entries = math.prod(int(d) for d in dimensions.split(",") if d)
    return entries * max(int(bits or 8) // 8, 1)  # a predicate takes a byte
