"""What a step sends between devices, against the size of the parameters, as devices are added."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
from cyclopts import Parameter
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

import cabs_jax
from experiments.benchmarks import _nets, _report
from experiments.benchmarks._collectives import collectives

NETS = ("mlp", "mnist_2c2d")
METHODS = ("factored", "between")
DEVICES = (1, 2, 4, 8)


def main(
    *,
    models: Annotated[tuple[str, ...], _report.choice(_nets.NAMES)] = NETS,
    methods: tuple[str, ...] = METHODS,
    devices: tuple[int, ...] = DEVICES,
    batch: int = 128,
    out: Path | None = None,
    in_this_process: Annotated[bool, Parameter(show=False)] = False,
) -> None:
    """Compiles the step for each number of virtual devices, and prints what it would send.

    Args:
      models: Nets.
      methods: Of `gradient_moments`.
      devices: Numbers of devices.
      batch: Batch size.
      out: Writes all numbers as JSON.
      in_this_process: Prints only JSON, for the largest number of devices.
    """
    if in_this_process:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(devices))
        print(json.dumps([measure(m, method, batch) for m in models for method in methods]))
        return
    results = []
    for count in track(devices, "bench scaling", transient=True):
        command = [sys.executable, "-m", "experiments", "bench", "scaling", "--in-this-process"]
        command += ["--models", *models, "--methods", *methods]
        command += ["--devices", str(count), "--batch", str(batch)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results += json.loads(output.splitlines()[-1])
    results.sort(key=lambda result: (result["net"], result["method"], result["devices"]))
    print(table(results))
    _report.write_json(out, {"batch": batch, "results": results})


def measure(name: str, method: Any, batch_size: int) -> dict[str, Any]:
    """Compiles the step for all devices of this process, and adds up what it sends."""
    net, count = _nets.build(name), jax.device_count()
    mesh = jax.make_mesh((count,), ("data",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    optimizer = cabs_jax.cabs(0.1)
    groups = 2 if method == "between" and count == 1 else None
    moments_of = cabs_jax.gradient_moments(net.loss, method=method, groups=groups)

    def step(params: Any, state: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
        m = moments_of(params, batch, mask=mask)
        updates, state = optimizer.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state

    params, state = jax.device_put((net.params, optimizer.init(net.params)), whole)
    examples = net.examples(batch_size), np.ones(batch_size, bool)
    batch, mask = jax.device_put(examples, split)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch, mask).compile()
    # XLA keeps operations of a single device, which send nothing.
    sent = collectives(compiled) if count > 1 else []
    return {
        "net": name,
        "method": method,
        "devices": count,
        "operations": sorted({collective.operation for collective in sent}),
        "arrays": sum(len(collective.arrays) for collective in sent),
        "collective_bytes": sum(sum(collective.arrays) for collective in sent),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "batch_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(batch)),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Bytes of one step. Of n devices in a ring each sends 2(n − 1)/n of what is reduced."""
    header = [
        "net", "method", "devices", "operations", "collective bytes",
        "parameter bytes", "beyond them", "sent by a device ÷ parameters",
    ]  # fmt: skip
    rows = []
    for result in results:
        count, sent, params = (
            result[key] for key in ("devices", "collective_bytes", "parameter_bytes")
        )
        rows.append(
            [
                result["net"],
                result["method"],
                str(count),
                ", ".join(result["operations"]) or "none",
                f"{sent:,}",
                f"{params:,}",
                f"{sent - params:,}" if count > 1 else "",
                f"{2 * (count - 1) / count * sent / params:.4f}",
            ]
        )
    return _report.markdown(header, rows)
