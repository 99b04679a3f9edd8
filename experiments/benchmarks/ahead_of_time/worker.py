"""A process that compiles a net's programs for a target, and prints what each costs.

Reads a `Job` as JSON from standard input; writes a line of JSON for each column, as it comes.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments.benchmarks.ahead_of_time import programs, targets
from experiments.benchmarks.ahead_of_time.costs import Costs, costs
from experiments.benchmarks.ahead_of_time.kernels import kernels


class Job(NamedTuple):
    """One net at one batch size, on one target.

    Attributes:
      platform: Of the target, "tpu" or "cuda".
      target: Its name.
      net: As `programs.work` knows it.
      batch_size: Number of examples.
      columns: Those of `programs.COLUMNS` to compile.
      hlo: Folder that the compiled texts are written to, or None.
    """

    platform: str
    target: str
    net: str
    batch_size: int
    columns: list[str]
    hlo: str | None = None


def main() -> None:
    """Compiles and prints."""
    job = Job(**json.load(sys.stdin))
    target = {"tpu": targets.tpu, "cuda": targets.gpu}[job.platform](job.target)
    mesh = Mesh(targets.devices(target), ("data",))
    compiled(lambda x: x + 1, (jax.ShapeDtypeStruct((8,), "float32"),), mesh)  # wakes the compiler
    work = programs.work(job.net, job.batch_size, mesh)
    for column in programs.columns_for(
        job.columns, job.net, job.batch_size, mesh.size, job.platform
    ):
        result: dict[str, Any]
        try:
            result = {"costs": _costs(job, column, work, target, mesh)._asdict()}
        except jax.errors.JaxRuntimeError as error:  # such as a program that the memory cannot hold
            result = {"error": str(error).partition("\n")[0]}
        print(json.dumps({"column": column, **result}), flush=True)


def compiled(function: Any, operands: tuple[Any, ...], mesh: Mesh) -> Any:
    """Compiles `function(*operands)` for the devices of a mesh."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or whole),
        operands,
    )
    return jax.jit(function).lower(*placed).compile()


def _costs(job: Job, column: str, work: programs.Work, target: targets.Target, mesh: Mesh) -> Costs:
    started = time.perf_counter()
    program = compiled(programs.program(column, work, mesh), (work.params, work.batch), mesh)
    elapsed = time.perf_counter() - started
    text = program.as_text()
    if job.hlo is not None:
        name = f"{job.target.replace(':', '-')}_{job.net}_{job.batch_size}_{column}.hlo"
        Path(job.hlo, name).write_text(text)
    return costs(kernels(text), target, program.memory_analysis().temp_size_in_bytes, elapsed)


if __name__ == "__main__":
    main()
