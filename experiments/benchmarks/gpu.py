"""Price of the gradient variance on a GPU that is not there: compiled for it, and read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field

from experiments.benchmarks.ahead_of_time import command, targets


@dataclasses.dataclass(frozen=True)
class GpuOptions(command.Options):
    """The options of `bench gpu`."""

    device: str = field(
        default="h100", metadata={"help": "GPU to compile for", "choices": tuple(targets.GPUS)}
    )


def run(options: GpuOptions) -> int:
    """Compiles for the GPU, prints the table and returns the exit status."""
    return command.bench(targets.gpu(options.device), options)


def main(argv: Sequence[str] = ()) -> None:
    """Runs the command line."""
    command.finish(run(command.parse(GpuOptions, "gpu", __doc__, argv)))
