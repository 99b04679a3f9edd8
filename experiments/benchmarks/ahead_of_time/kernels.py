"""What each kernel of a compiled module reads, writes, computes and sends."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.benchmarks._collectives import OPERATIONS as COLLECTIVES
from experiments.benchmarks.ahead_of_time import hlo

_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_FREE_CALLS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
}
_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand holds the new entries
_ELEMENTWISE = {
    *("abs", "add", "atan2", "cbrt", "ceil", "clamp", "cosine", "divide", "erf", "exponential"),
    *("exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum", "minimum"),
    *("multiply", "negate", "power", "remainder", "rsqrt", "select-and-scatter", "sign", "sine"),
    *("sqrt", "subtract", "tan", "tanh"),
}
_REDUCTIONS = {"reduce", "reduce-window"}


class Kernel(NamedTuple):
    """An instruction that takes time, and what one run of it does.

    Attributes:
      name: Of the instruction.
      opcode: Such as "fusion"; of a custom call, its target.
      source: Where in the traced program it comes from.
      runs: How often it runs: the product of the trips of the loops around it.
      memory_bytes: Read from and written to the device's main memory.
      nearby_bytes: Read from and written to other memories of the device (VMEM of a TPU).
      products: Operations of contractions, two for a multiplication and an addition, by precision:
        "bfloat16", "float32" (default precision) and "float32-highest".
      elementwise: Operations of everything else, one for each entry.
      collectives: Bytes that a device sends or receives, by kind of collective. One that a TPU
        spreads over several fusions, so that it runs beside their products, is at the first.
      sends: Whether it takes part in a collective.
      estimated_cycles: The compiler's own estimate, or None.
      is_transfer: Whether it is a copy that runs beside other kernels.
    """

    name: str
    opcode: str
    source: str
    runs: int
    memory_bytes: int
    nearby_bytes: int
    products: dict[str, int]
    elementwise: int
    collectives: dict[str, int]
    sends: bool
    estimated_cycles: int | None
    is_transfer: bool

    @property
    def flops(self) -> int:
        """Operations of one run."""
        return sum(self.products.values()) + self.elementwise


def kernels(text: str) -> list[Kernel]:
    """The kernels of a compiled module, those of a loop's body once, with how often they run.

    Args:
      text: What `jax.stages.Compiled.as_text` returns.

    Returns:
      One for each instruction that is neither free (a bitcast, a tuple) nor a loop. What a fusion
      or a called reduction holds belongs to the instruction that calls it. Of the branches of a
      conditional the one that moves most bytes counts.

    Raises:
      ValueError: If a loop's number of trips is not known.

    Example:
      >>> kernel, = kernels('''
      ... ENTRY %main (a: f32[2,3], b: f32[3,5]) -> f32[2,5] {
      ...   %a = f32[2,3]{1,0} parameter(0)
      ...   %b = f32[3,5]{1,0} parameter(1)
      ...   ROOT %c = f32[2,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ... }''')
      >>> kernel.memory_bytes, kernel.products
      (124, {'float32': 60})
    """
    module = hlo.parse(text)
    return list(_of_computation(module, module.entry, 1, set()))


def _of_computation(module: hlo.Module, name: str, runs: int, chains: set[str]) -> Iterator[Kernel]:
    """The kernels of a computation; `chains` name the spread collectives already counted."""
    computation = module.computations[name]
    for instruction in computation.values():
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            inner = runs * hlo.trips(module, instruction, computation)
            for role in ("condition", "body"):
                yield from _of_computation(module, called[role], inner, chains)
        elif opcode == "conditional":
            branches = [
                list(_of_computation(module, n, runs, chains)) for n in instruction.branches
            ]
            yield from max(branches, key=lambda b: sum(k.memory_bytes * k.runs for k in b))
        elif opcode == "call":
            yield from _of_computation(module, called["to_apply"], runs, chains)
        elif opcode == "async-start":
            for kernel in _of_computation(module, called["calls"], runs, chains):
                yield kernel._replace(is_transfer=True)
        elif not _is_free(instruction):
            yield _kernel(module, computation, instruction, runs, chains)


def _is_free(instruction: hlo.Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return _target(instruction) in _FREE_CALLS
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def _target(instruction: hlo.Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def _kernel(
    module: hlo.Module,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
    runs: int,
    chains: set[str],
) -> Kernel:
    moved = _moved(module, computation, instruction)
    products: dict[str, int] = {}
    collectives: dict[str, int] = {}
    elementwise, sends = 0, False
    for inside, each in _within(module, computation, instruction):
        told = _told(each)
        if count := told.get("products") or _products(inside, each):
            kind = _precision(inside, each)
            products[kind] = products.get(kind, 0) + count
            elementwise += told.get("elementwise", 0)
        else:
            elementwise += _elementwise(inside, each)
        if sent := _sent(inside, each):
            sends = True
            chain = each.attribute(r'(channel_id=\d+).*chain_id="\d+"')  # names its other parts
            if chain not in chains:
                kind = _collective_kind(instruction, each)
                collectives[kind] = collectives.get(kind, 0) + sent
            chains |= {chain} - {""}
    cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
    if told := _told(instruction):
        nearby = sum(nbytes for nbytes, space in moved if space != 0)
        moved = [(max(told["memory"] - nearby, 0), 0), (nearby, 1)]
    return Kernel(
        instruction.name,
        _target(instruction) or instruction.opcode,
        instruction.attribute(r'op_name="([^"]*)"'),
        runs,
        sum(nbytes for nbytes, space in moved if space == 0),
        sum(nbytes for nbytes, space in moved if space != 0),
        products,
        elementwise,
        collectives,
        sends,
        int(cycles) if cycles else None,
        instruction.opcode.endswith("-start"),
    )


def _told(instruction: hlo.Instruction) -> dict[str, int]:
    """What a Pallas kernel says of itself: operations, and bytes read and written in all."""
    if instruction.opcode != "custom-call":
        return {}
    said = instruction.attribute(r"kernel_metadata=\{([^}]*)\}")
    pairs = re.findall(r"(\w+)\W+(\d+)", said)
    return {key: int(number) for key, number in pairs}


def _within(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
    """The instruction itself, or what a fusion holds, each with the computation around it."""
    if instruction.opcode != "fusion":
        yield computation, instruction
        return
    fused = module.computations[instruction.called["calls"]]
    for inner in fused.values():
        yield from _within(module, fused, inner)


def _moved(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> list[tuple[int, int]]:
    """Bytes read and written, each with the memory space where they are."""
    opcode, results = instruction.opcode, instruction.arrays
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "copy-start":  # (destination, source, context)
        return [(a.stored_bytes, a.memory_space) for a in results[:2]]
    if opcode == "slice-start":  # ((source), destination, context)
        source, destination = results[:2]
        size = destination.stored_bytes
        return [(size, source.memory_space), (size, destination.memory_space)]
    if opcode == "fusion":
        fused = module.computations[instruction.called["calls"]]
        places = hlo.parameters(fused)
        reads = [
            (_read(module, fused, place), array.memory_space)
            for place, operand in zip(places, operands, strict=True)
            for array in operand.arrays[:1]
        ]
        result = hlo.root(fused)
        parts = [fused[n] for n in result.operands] if result.opcode == "tuple" else [result]
        written = [_written(module, fused, part) for part in parts]
        if len(written) != len(results):
            written = [a.stored_bytes for a in results]
        writes = [(n, a.memory_space) for n, a in zip(written, results, strict=True)]
        return reads + writes
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]].arrays[0]
        size = update.stored_bytes
        return [(size, update.memory_space), (size, results[0].memory_space)]
    if opcode in _SLICES:
        size = results[0].stored_bytes
        source = operands[0].arrays[0]
        return [(size, source.memory_space), (size, results[0].memory_space)]
    if opcode.removesuffix("-start") in COLLECTIVES:
        results = results[: len(results) // 2 or 1] if opcode.endswith("-start") else results
    everything = [*results, *(a for operand in operands for a in operand.arrays)]
    return [(a.stored_bytes, a.memory_space) for a in everything]


def _read(module: hlo.Module, fused: hlo.Computation, value: hlo.Instruction) -> int:
    """Bytes of a value that its users in a fusion read: only slices of it, or all."""
    whole, read = value.arrays[0].stored_bytes, 0
    if value.is_root:
        return whole
    for user in hlo.users(fused, value.name):
        places = [n for n, name in enumerate(user.operands) if name == value.name]
        if user.opcode == "bitcast":
            read += _read(module, fused, user)
        elif user.opcode in _SLICES and places == [0]:
            read += user.arrays[0].stored_bytes
        elif user.opcode in _UPDATES and places == [0]:
            read += 0
        elif user.opcode in COLLECTIVES:
            read += 0  # a part of a collective, whose bytes are counted as sent
        elif user.opcode == "fusion":
            inner = module.computations[user.called["calls"]]
            read += sum(_read(module, inner, hlo.parameters(inner)[n]) for n in places)
        else:
            return whole
    return min(read, whole)


def _written(module: hlo.Module, fused: hlo.Computation, value: hlo.Instruction) -> int:
    """Bytes of a fusion's result that are written: of an update in place, only the update."""
    source = value
    while source.opcode == "bitcast":
        source = fused[source.operands[0]]
    if source.opcode in COLLECTIVES:
        return 0
    if source.opcode in _UPDATES:
        return fused[source.operands[_UPDATES[source.opcode]]].arrays[0].stored_bytes
    if source.opcode == "fusion" and len(source.arrays) == 1:
        inner = module.computations[source.called["calls"]]
        return _written(module, inner, hlo.root(inner))
    return sum(a.stored_bytes for a in value.arrays)


def _products(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """Operations of a contraction, 0 of anything else."""
    target = _target(instruction)
    shapes = [
        computation[name].arrays[0].shape
        for name in instruction.operands
        if name in computation and computation[name].arrays
    ]
    if instruction.opcode == "dot" or "$gemm" in target or "$lt$matmul" in target:
        axes = instruction.attribute(r"lhs_contracting_dim(?:ension)?s[\"=:]*[{\[]([\d,\"]*)[}\]]")
        summed = [shapes[0][int(axis)] for axis in axes.replace('"', "").split(",") if axis]
        return 2 * int(np.prod([*instruction.arrays[0].shape, *summed], dtype=np.int64))
    result = instruction.arrays[0].shape if instruction.arrays else ()
    if instruction.opcode == "convolution" or target == "__cudnn$convBiasActivationForward":
        return _convolution(instruction, shapes[0], shapes[1], result)
    if target == "__cudnn$convForward":
        return _convolution(instruction, shapes[0], shapes[1], result)
    if target == "__cudnn$convBackwardInput":
        return _convolution(instruction, result, shapes[1], shapes[0])
    if target == "__cudnn$convBackwardFilter":
        return _convolution(instruction, shapes[0], result, shapes[1])
    return 0


def _convolution(
    instruction: hlo.Instruction,
    image: tuple[int, ...],
    kernel: tuple[int, ...],
    result: tuple[int, ...],
) -> int:
    """Leaves out products with padding and with the zeros of a dilation."""
    labels = re.split(r"_|->", instruction.attribute(r"dim_labels=([^\s,]+)"))
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", instruction.attribute(r"window=\{([^}]*)\}")))
    of_image, of_kernel, of_result = labels
    products = result[of_result.index("b")] * result[of_result.index("f")]
    products *= kernel[of_kernel.index("i")]
    for axis, digit in enumerate(sorted(set(of_result) - {"b", "f"})):
        size, step, low, wide, gap = (
            _of_window(window, key, axis, default)
            for key, default in (
                ("size", 1),
                ("stride", 1),
                ("pad", 0),
                ("lhs_dilate", 1),
                ("rhs_dilate", 1),
            )
        )
        outputs = np.arange(result[of_result.index(digit)])[:, None]
        place = outputs * step + np.arange(size)[None] * gap - low
        inside = (place >= 0) & (place <= (image[of_image.index(digit)] - 1) * wide)
        products *= int(np.sum(inside & (place % wide == 0)))
    return 2 * products


def _of_window(window: dict[str, str], key: str, axis: int, default: int) -> int:
    """The value of an axis in an attribute such as "3x3", the lower one in "1_1x1_1"."""
    return int(window[key].split("x")[axis].split("_")[0]) if key in window else default


def _precision(computation: hlo.Computation, instruction: hlo.Instruction) -> str:
    kinds = {computation[n].arrays[0].dtype for n in instruction.operands[:2] if n in computation}
    if not kinds & {"f32", "f64"}:
        return "bfloat16"
    highest = re.search(r"operand_precision\W+[^}\]]*highest", instruction.attributes, re.I)
    return "float32-highest" if highest else "float32"


def _elementwise(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _REDUCTIONS and instruction.operands[0] in computation:
        return _entries(computation[instruction.operands[0]])
    return _entries(instruction) if opcode in _ELEMENTWISE else 0


def _entries(instruction: hlo.Instruction) -> int:
    floating = [a for a in instruction.arrays[:1] if a.dtype[:1] in ("f", "b", "c")]
    return sum(int(np.prod(a.shape, dtype=np.int64)) for a in floating)


def _sent(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """Bytes of a collective: those that a device holds before it or after it, whichever is more."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return 0
    if kind == "all-gather":
        results = instruction.arrays
        if instruction.opcode.endswith("-start"):  # (operands, results, and perhaps contexts)
            results = results[len(instruction.operands) :][: len(instruction.operands)]
        return sum(a.nbytes for a in results)
    operands = (computation[name] for name in instruction.operands if name in computation)
    return sum(a.nbytes for operand in operands for a in operand.arrays)


def _collective_kind(outer: hlo.Instruction, inner: hlo.Instruction) -> str:
    kind = inner.opcode.removesuffix("-start")
    if kind == "all-reduce" and "reduce-scatter" in outer.attribute(r"calls=%([^\s,]+)"):
        return "reduce-scatter"  # a TPU fuses the sum and the slice of it that a device keeps
    return kind
