"""Price of the gradient variance on a TPU that is not there: compiled for it, and read."""

from typing import Annotated

from cyclopts import Parameter

from experiments.benchmarks.ahead_of_time import command, targets


def main(
    *,
    topology: str = "v5e:1x1",
    options: Annotated[command.Options, Parameter(name="*")] = command.Options(),  # noqa: B008
) -> int:
    """Compiles for the slice, prints the table and returns the exit status.

    Args:
      topology: TPU slice, such as v5e:2x2, v5p:2x2x1 or v6e:1x1.
      options: What to compile, and what to do with the figures.
    """
    return command.bench(targets.tpu(topology), options)
