"""One of several processes that load global batches; prints what it saw as JSON.

Arguments: port of the coordinator, number of processes, index of this one, and the requests, JSON
objects: `kind` of source, its `length`, batch `sizes`, `pad_to`, and the loader's `state`.
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import BatchLoader


class Records:
    """Integers, with a log of which were read."""

    def __init__(self, length):
        self.length = length
        self.read = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        return index


def main(port, processes, process, requests):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    print(json.dumps([read(mesh, request) for request in requests]))


def read(mesh, request):
    records = Records(request["length"])
    source = records if request["kind"] == "records" else np.arange(request["length"])
    result = {"batches": [], "local": []}
    sharding = NamedSharding(mesh, P("data"))
    with BatchLoader(source, seed=3, sharding=sharding, pad_to=request["pad_to"]) as loader:
        loader.set_state(request["state"])
        for size in request["sizes"]:
            loader.batch_size = jax.device_put(np.int32(size), NamedSharding(mesh, P()))
            batch = next(loader)
            examples, mask = batch if request["pad_to"] else (batch, batch >= 0)
            result["local"].append(addressable(examples)[addressable(mask)].tolist())
            examples, mask = multihost_utils.process_allgather((examples, mask), tiled=True)
            result["batches"].append(examples[mask].tolist())
        result["state"] = loader.get_state()
    return {**result, "read": records.read}


def addressable(array):
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.concatenate([shard.data for shard in shards])


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
