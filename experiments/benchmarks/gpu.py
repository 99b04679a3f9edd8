"""Price of the gradient variance on a GPU that is not there: compiled for it, and read."""

from typing import Annotated, Literal

from cyclopts import Parameter

from experiments.benchmarks.ahead_of_time import command, targets


def main(
    *,
    device: Literal["h100", "a100"] = "h100",
    options: Annotated[command.Options, Parameter(name="*")] = command.Options(),  # noqa: B008
) -> int:
    """Compiles for the GPU, prints the table and returns the exit status.

    Args:
      device: GPU to compile for.
      options: What to compile, and what to do with the figures.
    """
    return command.bench(targets.gpu(device), options)
