"""What a compiled program costs in all: its kernels added up, and the time that they would take."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from experiments.benchmarks.ahead_of_time.kernels import Kernel
from experiments.benchmarks.ahead_of_time.targets import Target

LISTED = 12
MODELS = {
    "tpu": (
        "cycles: the compiler's own estimate of each fusion times its runs. What it gives no "
        "estimate for (Pallas calls, select-and-scatter, small operations) gets a roofline: "
        "bytes over the bandwidth of main memory and of VMEM (22 times as fast), operations over "
        "the peak; 'ours' is its share. That of a Pallas call is of what it says it does, with no "
        "part of a unit idle and no stalls: a lower bound. Copies that run beside kernels, and "
        "collectives, take no cycles here."
    ),
    "cuda": (
        "time: each kernel takes 2 µs to launch and then the longer of its bytes over the memory's "
        "bandwidth and its operations over the peak of their precision. The cache, occupancy and "
        "the choices that tuning on a device makes are not modelled."
    ),
}


class Hot(NamedTuple):
    """Kernels of one name and source: where a program's time is."""

    seconds: float
    runs: int
    name: str
    source: str


class Costs(NamedTuple):
    """What one run of a program takes, on one device.

    Attributes:
      seconds: Modelled, as `MODELS` says.
      modelled_seconds: The part of it that is not the compiler's own estimate.
      kernels: Kernels launched.
      memory_bytes: Read from and written to main memory.
      flops: Operations.
      collective_bytes: Sent or received, by kind of collective.
      temporary_bytes: Memory needed beside arguments and results.
      compile_seconds: To trace and compile.
      hottest: The kernels that take most of the time, the longest first.
      operations: Seconds by the operation that kernels come from, such as "dot_general".
    """

    seconds: float
    modelled_seconds: float
    kernels: int
    memory_bytes: int
    flops: int
    collective_bytes: dict[str, int]
    temporary_bytes: int
    compile_seconds: float
    hottest: list[Hot]
    operations: dict[str, float]


def costs(
    kernels: Sequence[Kernel], target: Target, temporary_bytes: int = 0, compile_seconds: float = 0
) -> Costs:
    """Adds up the kernels of a program."""
    times = [seconds(kernel, target) for kernel in kernels]
    launched = [kernel for kernel in kernels if not kernel.is_transfer]
    collectives: dict[str, int] = {}
    operations: dict[str, float] = {}
    for time, kernel in zip(times, kernels, strict=True):
        operation = kernel.source.rpartition("/")[2] or kernel.opcode
        operations[operation] = operations.get(operation, 0.0) + time
        for kind, nbytes in kernel.collectives.items():
            collectives[kind] = collectives.get(kind, 0) + nbytes * kernel.runs
    return Costs(
        sum(times),
        sum(t for t, k in zip(times, kernels, strict=True) if k.estimated_cycles is None),
        sum(kernel.runs for kernel in launched),
        sum(kernel.memory_bytes * kernel.runs for kernel in kernels),
        sum(kernel.flops * kernel.runs for kernel in kernels),
        collectives,
        temporary_bytes,
        compile_seconds,
        _hottest(zip(times, kernels, strict=True)),
        operations,
    )


def seconds(kernel: Kernel, target: Target) -> float:
    """The time of all runs of a kernel: estimated by the compiler, else by a roofline."""
    if kernel.estimated_cycles is not None:
        return kernel.runs * kernel.estimated_cycles / target.hertz
    if kernel.is_transfer or kernel.sends:
        return 0.0
    moving = kernel.memory_bytes / target.memory_bandwidth
    moving = max(moving, kernel.nearby_bytes / target.nearby_bandwidth)
    computing = kernel.elementwise / target.elementwise_rate + sum(
        count / target.product_rates[kind] for kind, count in kernel.products.items()
    )
    return kernel.runs * (target.launch_seconds + max(moving, computing))


def _hottest(timed: Iterable[tuple[float, Kernel]]) -> list[Hot]:
    found = [Hot(t, k.runs, f"{k.name} ({k.opcode})", k.source) for t, k in timed]
    return sorted(found, reverse=True)[:LISTED]
