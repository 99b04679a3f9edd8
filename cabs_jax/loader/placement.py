"""Where the examples of a global batch live: which process reads them, which devices hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding


class Placement(NamedTuple):
    """How the leading axis of a batch is divided.

    Attributes:
      shards: Number of distinct slices that devices hold.
      readers: Number of distinct shares that processes read. It is less than the number of
        processes where some of them are replicas and read the same examples.
      reader: Index of this process's share.
    """

    shards: int = 1
    readers: int = 1
    reader: int = 0

    def own(self, position: int) -> int:
        """How many of the examples before a position, of all processes, are this process's."""
        return (position - self.reader + self.readers - 1) // self.readers


def placement(sharding: Sharding | None) -> Placement:
    """Divides the leading axis among the processes.

    Raises:
      TypeError: If `sharding` is no `jax.sharding.Sharding`.
      ValueError: If it splits another axis than the leading one, leaves out this process, or
        gives two processes shares that differ but overlap.
    """
    if sharding is None:
        return Placement()
    if not isinstance(sharding, Sharding):
        raise TypeError(
            "sharding must be a jax.sharding.Sharding such as NamedSharding(mesh, P('data')), got "
            f"{sharding!r}."
        )
    if isinstance(sharding, NamedSharding) and any(sharding.spec[1:]):
        raise ValueError(f"sharding must split no axis but the leading one, got {sharding.spec}.")
    rows = len(sharding.device_set)  # a number that splits evenly, whatever the mesh
    shares: dict[int, set[int]] = {}
    slices: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    for device, (index,) in slices.items():
        shares.setdefault(device.process_index, set()).add(index.start or 0)
    process = jax.process_index()
    if process not in shares:
        raise ValueError(f"sharding has no device of process {process}.")
    distinct = sorted({tuple(sorted(share)) for share in shares.values()})
    starts = [start for share in distinct for start in share]
    if len(set(starts)) < len(starts) or len({len(share) for share in distinct}) > 1:
        raise ValueError(
            "every two processes must hold the same shards of a batch or none in common, got "
            f"{shares}: order the mesh by process."
        )
    return Placement(len(starts), len(distinct), distinct.index(tuple(sorted(shares[process]))))


def place(batch: Any, sharding: Sharding) -> Any:
    """Global arrays of this process's rows; the transfer to the devices is not waited for."""
    return jax.make_array_from_process_local_data(sharding, batch)


def sum_over_processes(values: tuple[int, ...], sharding: Sharding, placement: Placement) -> Any:
    """The sums of what each process holds, int32 (len(values),), the same on all of them.

    All processes must call it, and it waits for the devices.
    """
    own = np.zeros((placement.shards // placement.readers, len(values)), np.int32)
    own[0] = values
    return np.asarray(_sum_over_shards(place(own, sharding)))


_sum_over_shards = jax.jit(lambda values: values.sum(axis=0))
