"""The devices that can be compiled for, what they are known to do, and how JAX is told of them."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UserError

VMEM_SPEEDUP = 22  # of a TPU's VMEM over its main memory, about
LAUNCH_SECONDS = 2e-6  # of a kernel on a GPU, about
DESCRIPTIONS = Path(__file__).parent


class Target(NamedTuple):
    """A device, its published limits, and how many of them make the machine.

    Attributes:
      platform: "tpu" or "cuda".
      name: Of a TPU topology, such as "v5e:2x2"; of a GPU, such as "h100".
      hertz: Clock, in which the estimates of a TPU's compiler are counted.
      memory_bandwidth: Of the main memory, bytes a second.
      nearby_bandwidth: Of the memory beside the units, bytes a second.
      product_rates: Operations a second in contractions, by precision as in `kernels.Kernel`.
      elementwise_rate: Operations a second elsewhere.
      launch_seconds: That starting a kernel takes.
    """

    platform: str
    name: str
    hertz: float
    memory_bandwidth: float
    nearby_bandwidth: float
    product_rates: Mapping[str, float]
    elementwise_rate: float
    launch_seconds: float


def tpu(topology: str) -> Target:
    """A TPU slice, such as "v5e:1x1" or "v5p:2x2x1".

    Raises:
      UserError: If the generation is not one of `GENERATIONS`.
    """
    generation = topology.partition(":")[0]
    if generation not in GENERATIONS or ":" not in topology:
        known = ", ".join(f"{name}:…" for name in GENERATIONS)
        raise UserError(f"unknown topology {topology!r}; give one of {known}, such as v5e:1x1.")
    hertz, bandwidth, peak = GENERATIONS[generation]
    rates = {"bfloat16": peak, "float32": peak, "float32-highest": peak / 6}
    # Eight by 128 lanes with four units each.
    return Target(
        "tpu", topology, hertz, bandwidth, VMEM_SPEEDUP * bandwidth, rates, 4096 * hertz, 0.0
    )


def gpu(device: str) -> Target:
    """A GPU, one of `GPUS`."""
    if device not in GPUS:
        raise UserError(f"unknown device {device!r}; known devices: {', '.join(GPUS)}.")
    bandwidth, bfloat16, tensor32, float32 = GPUS[device]
    rates = {"bfloat16": bfloat16, "float32": tensor32, "float32-highest": float32}
    return Target("cuda", device, 1e9, bandwidth, bandwidth, rates, float32 / 2, LAUNCH_SECONDS)


# Clock, bytes a second, bfloat16 operations a second; as published.
GENERATIONS = {
    "v5e": (1.5e9, 819e9, 197e12),
    "v5p": (1.75e9, 2765e9, 459e12),
    "v6e": (1.75e9, 1640e9, 918e12),
}
# Bytes a second; operations a second in bfloat16, TF32 and float32; as published (SXM, dense).
GPUS = {
    "h100": (3.35e12, 989e12, 495e12, 67e12),
    "a100": (2.04e12, 312e12, 156e12, 19.5e12),
}


def check_installed(platform: str) -> None:
    """Raises `UserError` if what compiles for a platform is not installed."""
    module, extra = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda12_plugin", "gpu")}[platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{module} is not installed, which compiles for {platform}; "
            f"pip install 'cabs_jax[{extra}]'."
        )


def environment(platform: str) -> dict[str, str]:
    """The environment of a process that compiles for a platform and runs nothing on it."""
    settings = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if platform == "tpu":
        settings |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    return os.environ | settings


def devices(target: Target) -> list[Any]:
    """The devices to compile for, none of which is there."""
    from jax.experimental import topologies

    if target.platform == "tpu":
        description = topologies.get_topology_desc(platform="tpu", topology_name=target.name)
    else:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology="1x1x1",
            target_config=(DESCRIPTIONS / f"{target.name}.txtpb").read_text(),
        )
    return list(description.devices)
