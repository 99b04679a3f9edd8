"""Price of the gradient variance on a TPU that is not there: compiled for it, and read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field

from experiments.benchmarks.ahead_of_time import command, targets


@dataclasses.dataclass(frozen=True)
class TpuOptions(command.Options):
    """The options of `bench tpu`."""

    topology: str = field(
        default="v5e:1x1", metadata={"help": "TPU slice, such as v5e:2x2, v5p:2x2x1 or v6e:1x1"}
    )


def run(options: TpuOptions) -> int:
    """Compiles for the slice, prints the table and returns the exit status."""
    return command.bench(targets.tpu(options.topology), options)


def main(argv: Sequence[str] = ()) -> None:
    """Runs the command line."""
    command.finish(run(command.parse(TpuOptions, "tpu", __doc__, argv)))
