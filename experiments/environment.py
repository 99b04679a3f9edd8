"""What numbers were measured with: machine and versions."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def describe() -> dict[str, Any]:
    """Processor, its cores and those that this process uses, devices, and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "cores_used": len(cores()) if hasattr(os, "sched_getaffinity") else None,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
