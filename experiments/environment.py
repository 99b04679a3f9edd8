"""What numbers were measured with: machine and versions."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import cabs_jax

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


def code() -> dict[str, str]:
    """What computes the numbers: versions of Python and packages, and a hash of our own sources."""
    digest = hashlib.blake2b(digest_size=8)
    for package in (Path(cabs_jax.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package.parent)}".encode())
            digest.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
        "sources": digest.hexdigest(),
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
