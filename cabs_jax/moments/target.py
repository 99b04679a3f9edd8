"""The machine that is compiled for, and what things cost there.

`sharding.target` finds it out once for each call; from there on it travels with the batch, and
nothing asks the process, which may have other devices than those it compiles for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

Platform = Literal["cpu", "gpu", "tpu"]
AxisNames = str | tuple[str, ...]
Kernels = bool | Literal["interpret"]


class Costs(NamedTuple):
    """What a platform is good at.

    Attributes:
      traffic: As many multiplications cost what it costs to write a number of a per-example
        gradient and to read it again: in products of float32, in highest precision.
      rounded_traffic: The same in products of rounded or 16-bit numbers.
      rounds_alike: Whether all contractions at default precision round a float32 operand to the
        same bfloat16 number, whatever else is multiplied with it.
      patch_traffic: The same for a number of a patch of an image that is laid out for a product.
        Where it is not 0, convolutions are measured row by row instead if they can.
      sorts_from: The number of positions from which look-ups are sorted to add up equal ones,
        rather than each compared with every other; None where sorting is slow.
      budget: Bytes of intermediate results that stay near the units while a norm is taken.
      is_shared: Whether all devices share that memory, as the CPU devices of one process do.
    """

    traffic: int
    rounded_traffic: int
    rounds_alike: bool
    patch_traffic: int
    sorts_from: int | None
    budget: int
    is_shared: bool


# Of a CPU measured on two cores, of a TPU by the compiler's estimates for a v5e, of a GPU by the
# limits of an H100: three passes over memory against the products that it can do in that time.
COSTS: dict[Platform, Costs] = {
    "cpu": Costs(30, 30, False, 0, 192, budget=4 * 2**20, is_shared=True),
    "gpu": Costs(120, 1800, False, 0, None, budget=256 * 2**20, is_shared=False),
    "tpu": Costs(90, 450, True, 16_000, None, budget=256 * 2**20, is_shared=False),
}


class Target(NamedTuple):
    """The machine, and how the batch lies on it.

    Attributes:
      platform: What the devices are.
      lanes: Number of devices over which a batch may be split without its shape showing it; 1
        where every device sees its own part alone.
      spmd_axis_name: Mesh axes that the compiler is told to split every batch over, or None.
      kernels: Whether kernels are used where there are some, or "interpret" for slow ones.
    """

    platform: Platform
    lanes: int = 1
    spmd_axis_name: tuple[str, ...] | None = None
    kernels: Kernels = False

    @property
    def costs(self) -> Costs:
        """What things cost there."""
        return COSTS[self.platform]

    def budget(self, lanes: int) -> int:
        """Bytes that stay near the units of the devices of some lanes."""
        return self.costs.budget * (1 if self.costs.is_shared else lanes)

    def vmap(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        """`jax.vmap` over examples, which keeps them where they are."""
        mapped: Callable[..., Any] = jax.vmap(function, in_axes, spmd_axis_name=self.spmd_axis_name)
        return mapped


def platform_named(name: str) -> Platform:
    """The platform of a device, by the name that JAX gives it.

    >>> platform_named("cuda"), platform_named("tpu")
    ('gpu', 'tpu')
    """
    # What is neither a CPU nor a TPU has small caches, many units and a large memory.
    return "cpu" if name == "cpu" else "tpu" if name == "tpu" else "gpu"


def check_platform(platform: str | None) -> None:
    """Raises ValueError unless a platform is None or one of those known."""
    if platform is not None and platform not in get_args(Platform):
        raise ValueError(f"platform must be one of {get_args(Platform)} or None, got {platform!r}.")


def with_kernels(target: Target, kernels: Kernels) -> Target:
    """The target, to be measured by kernels.

    Raises:
      ValueError: If kernels are asked for where there are none.
    """
    if not kernels:
        return target
    if kernels is True and target.platform != "tpu":
        raise ValueError(
            f"kernels=True is for TPUs, and this is compiled for {target.platform!r}: leave it "
            'out, or pass platform="tpu" where it is for a TPU that this process does not have.'
        )
    if target.lanes > 1 or target.spmd_axis_name:
        raise ValueError(
            f"kernels={kernels!r} cannot be split by the compiler, and the batch may be on "
            f"{target.lanes} devices: pass mesh= (or axis_name= in your own shard_map) instead of "
            'spmd_axis_name=, or platform="tpu" where it is all on one device.'
        )
    return target._replace(kernels=kernels)
