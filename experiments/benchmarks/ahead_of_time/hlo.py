"""The text of an optimized HLO module as computations of instructions, and how often each runs."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPERAND = re.compile(r"%([^\s,()]+)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([^\s,]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_KERNEL = re.compile(r"kernel_metadata=\{[^}]*\}")  # of a Pallas kernel; written over several lines
_COMMENT = re.compile(r"/\*.*?\*/")
_MOVES = ("bitcast", "convert", "copy", "reshape")


class Array(NamedTuple):
    """One array in the type of an instruction.

    Attributes:
      dtype: Name of the element type, such as "bf16".
      shape: Its sizes.
      nbytes: Bytes of its elements.
      stored_bytes: Bytes that it takes, the sizes padded to the tiles of its layout.
      memory_space: 0 is the device's main memory; on TPU 1 is VMEM, and more are smaller ones.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored_bytes: int
    memory_space: int


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: Unique in its module.
      opcode: Such as "fusion".
      arrays: Its result; those of a tuple flattened.
      operands: Names of instructions of the same computation.
      argument: What stands between the parentheses.
      attributes: What follows them.
      is_root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @property
    def called(self) -> dict[str, str]:
        """Names of the computations it runs, by role ("calls", "body", "condition", ...)."""
        return dict(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> list[str]:
        """Names of the computations of which a conditional runs one."""
        if match := _BRANCHES.search(self.attributes):
            return _OPERAND.findall(match[1])
        return [n for role, n in self.called.items() if role.endswith("_computation")]

    def attribute(self, pattern: str) -> str:
        """The group of a regular expression in the attributes, or "" where it does not match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Computation = Mapping[str, Instruction]


class Module(NamedTuple):
    """A module: its computations by name, each of instructions by name, and the entry's name."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses what `jax.stages.Compiled.as_text` returns.

    >>> module = parse('''
    ... ENTRY %main (a: f32[2,3]) -> f32[3,2] {
    ...   %a = f32[2,3]{1,0} parameter(0)
    ...   ROOT %t = f32[3,2]{1,0} transpose(%a), dimensions={1,0}
    ... }''')
    >>> module.computations["main"]["t"].operands, module.computations["main"]["t"].arrays[0].nbytes
    (('a',), 24)
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _KERNEL.sub(lambda match: match[0].replace("\n", ""), text).splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation; pass that of a compiled module.")
    return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays in a type, with the padding of tiled layouts.

    >>> [(a.nbytes, a.stored_bytes, a.memory_space)
    ...  for a in arrays("(bf16[3,100]{1,0:T(8,128)(2,1)S(1)}, pred[])")]
    [(600, 2048, 1), (1, 1, 0)]
    """
    return tuple(_array(*groups) for groups in _ARRAY.findall(_COMMENT.sub("", text)))


def root(computation: Computation) -> Instruction:
    """The result of a computation."""
    return next(i for i in computation.values() if i.is_root)


def parameters(computation: Computation) -> list[Instruction]:
    """The parameters of a computation, in their order."""
    found = (i for i in computation.values() if i.opcode == "parameter")
    return sorted(found, key=lambda i: int(i.argument))


def users(computation: Computation, name: str) -> Iterator[Instruction]:
    """The instructions that take `name` as an operand."""
    return (i for i in computation.values() if name in i.operands)


def without_moves(computation: Computation, instruction: Instruction) -> Instruction:
    """Follows copies, bitcasts, conversions and reshapes to where a value comes from."""
    while instruction.opcode in _MOVES and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return instruction


def trips(module: Module, loop: Instruction, computation: Computation) -> int:
    """How often the body of a while instruction runs.

    Args:
      module: Of which the loop is a part.
      loop: A "while" instruction.
      computation: That which holds it.

    Returns:
      The compiler's own count where the text has it; else, for a loop that counts upward from one
      constant to another, what follows from its condition, its body and its start.

    Raises:
      ValueError: If neither is there.
    """
    if known := _KNOWN_TRIPS.search(loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called["condition"]]
    compare, arguments = _comparison(module, condition)
    direction = compare.attribute(r"direction=(\w+)")
    if compare.opcode == "compare" and direction in ("LT", "LE"):
        index = _tuple_index(condition, arguments[0])
        start = _entering(computation, loop, index) if index is not None else None
        limit = _constant(condition, arguments[1])
        if limit is None and (place := _tuple_index(condition, arguments[1])) is not None:
            limit = _entering(computation, loop, place)
        step = _step(module.computations[loop.called["body"]], index)
        if start is not None and limit is not None and step is not None and step > 0:
            return max(0, math.ceil((limit + (direction == "LE") - start) / step))
    raise ValueError(
        f"the trips of loop {loop.name} are not constants of its text; its cost is unknown."
    )


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    type_end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, type_end)
    if opcode is None:
        return None
    argument_end = opcode.end() + _closing(rest[opcode.end() - 1 :]) - 1
    argument = _COMMENT.sub("", rest[opcode.end() : argument_end])
    return Instruction(
        match[2],
        opcode[1],
        arrays(rest[:type_end]),
        tuple(_OPERAND.findall(argument)),
        argument,
        rest[argument_end + 1 :],
        bool(match[1]),
    )


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _array(kind: str, bits: str, sizes: str, layout: str) -> Array:
    shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    width = 0 if kind in ("token", "opaque") else max(int(bits or 8), 1)  # a predicate: a byte
    order, _, tiling = layout.partition(":")
    stored = list(shape)
    if tile := re.match(r"T\(([\d,]+)\)", tiling):
        minor_first = [int(axis) for axis in order.split(",") if axis]
        for axis, size in zip(minor_first, reversed(tile[1].split(",")), strict=False):
            stored[axis] = -(-stored[axis] // int(size)) * int(size)
    space = re.search(r"S\((\d+)\)", tiling)
    nbytes, stored_bytes = ((math.prod(s) * width + 7) // 8 for s in (shape, stored))
    return Array(kind + bits, shape, nbytes, stored_bytes, int(space[1]) if space else 0)


def _comparison(module: Module, condition: Computation) -> tuple[Instruction, list[Instruction]]:
    """What a loop's condition compares: the comparison, and its operands in the condition."""
    result = root(condition)
    if result.opcode != "fusion":
        return result, [condition[name] for name in result.operands]
    fused = module.computations[result.called["calls"]]
    inner = root(fused)
    outer = []
    for name in inner.operands:
        source = without_moves(fused, fused[name])
        if source.opcode == "parameter":
            source = condition[result.operands[int(source.argument)]]
        outer.append(source)
    return inner, outer


def _tuple_index(computation: Computation, instruction: Instruction) -> int | None:
    """Which element of the loop's state a value is, if it is one."""
    source = without_moves(computation, instruction)
    if source.opcode == "get-tuple-element":
        return int(source.attribute(r"\bindex=(\d+)"))
    return None


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    source = without_moves(computation, instruction)
    if source.opcode == "constant" and re.fullmatch(r"-?\d+", source.argument):
        return int(source.argument)
    return None


def _entering(computation: Computation, loop: Instruction, index: int) -> int | None:
    """The constant that an element of a loop's state starts with."""
    state = computation[loop.operands[0]]
    if state.opcode != "tuple":
        return None
    return _constant(computation, computation[state.operands[index]])


def _step(body: Computation, index: int | None) -> int | None:
    """By how much the body adds to its counter; 1 where a fusion hides the addition."""
    result = root(body)
    if index is None or result.opcode != "tuple":
        return None
    following = without_moves(body, body[result.operands[index]])
    if following.opcode == "add":
        steps = [_constant(body, body[name]) for name in following.operands]
        return next((step for step in steps if step is not None), None)
    return 1 if following.opcode in ("fusion", "get-tuple-element") else None
