"""One of several processes with a stream of its own each; prints what it saw as JSON.

Arguments: port of the coordinator, number of processes, index of this one, and the requests, JSON
objects: `lengths` of the streams, `sizes` of the batches, `epochs`, and which process's stream
`fails` after its last example, if any.
"""

import json
import sys

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import BatchLoader


class Stream:
    """Numbers that tell which process's they are, and how far it is."""

    def __init__(self, process, length, fails):
        self.process, self.length, self.fails = process, length, fails
        self.index = 0

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]

    def __iter__(self):
        while self.index < self.length:
            self.index += 1
            yield 1000 * self.process + self.index - 1
        if self.fails:
            raise OSError("bad sector")
        self.index = 0


def main(port, processes, process, requests):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), P("data"))
    print(json.dumps([see(process, sharding, request) for request in requests]))


def see(process, sharding, request):
    seen = {"batches": [], "resumed": [], "error": None}

    def load(name, sizes, state):
        source = Stream(process, request["lengths"][process], request["fails"] == process)
        with BatchLoader(source, sharding=sharding, pad_to=32, epochs=request["epochs"]) as loader:
            if state is not None:
                loader.set_state(state)
            for loader.batch_size in sizes:
                batch = next(loader, None)
                if batch is None:
                    seen[name].append(None)
                    break
                examples, mask = multihost_utils.process_allgather(batch, tiled=True)
                seen[name].append(examples[mask].tolist())
            return loader.examples_seen, loader.get_state()

    try:
        half = len(request["sizes"]) // 2
        _, state = load("batches", request["sizes"][:half], None)
        seen["examples_seen"], _ = load("resumed", request["sizes"][half:], state)
    except Exception as error:
        seen["error"] = str(error)
    return seen


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
