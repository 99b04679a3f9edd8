"""One of several processes that train one net; prints what it saw as JSON.

Arguments: port of the coordinator, number of processes, index of this one, and the request, a JSON
object: `devices` of each process, `steps`, a `checkpoint` to start from and one to `save`; and
[process, step] to `die` at, and the seconds without a `heartbeat` after which the others notice.
"""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax

LARGEST = 64


class Records:
    """Computed examples, and a log of which were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        self.read.append(index)
        x = np.random.default_rng(index).normal(size=4).astype(np.float32)
        return {"x": x, "y": np.sin(3 * x.sum()), "index": np.int32(index)}


def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["w"] + params["b"])
    return (hidden @ params["out"] - example["y"]) ** 2


def main(port, processes, process, request):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", request["devices"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        int(processes),
        int(process),
        heartbeat_timeout_seconds=request.get("heartbeat", 100),
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    random = np.random.default_rng(0)
    params = {
        "w": random.normal(size=(4, 8)).astype(np.float32),
        "b": np.zeros(8, np.float32),
        "out": random.normal(size=8).astype(np.float32) / 3,
    }
    optimizer = cabs_jax.cabs(0.1, max_batch_size=LARGEST, decay=0.5, scale=16.0)
    start, records = (params, optimizer.init(params)), Records()
    loader = cabs_jax.BatchLoader(records, seed=3, sharding=split, pad_to=LARGEST)
    if "checkpoint" in request:
        with np.load(request["checkpoint"]) as saved:
            leaves = [saved[str(i)] for i in range(len(saved.files) - 1)]
            start = jax.tree.unflatten(jax.tree.structure(start), leaves)
            loader.set_state(json.loads(str(saved["loader"])))
    params, state = jax.device_put(start, whole)
    moments_of = cabs_jax.gradient_moments(loss_fn)

    @jax.jit
    def step(params, state, batch, mask):
        example = {"x": batch["x"], "y": batch["y"]}
        m = moments_of(params, example, mask=mask)
        updates, state = optimizer.update(
            m.mean, state, params, value=m.value, gradient_variance=m.variance, count=m.count
        )
        return optax.apply_updates(params, updates), state

    sizes, losses, local = [], [], []
    with loader:
        for number in range(request["steps"]):
            if request.get("die") == [int(process), number]:
                os.kill(os.getpid(), signal.SIGKILL)
            loader.batch_size = cabs_jax.batch_size(state)
            sizes.append(int(loader.batch_size))
            batch, mask = next(loader)
            shards = zip(batch["index"].addressable_shards, mask.addressable_shards, strict=True)
            local.append([i for x, keep in shards for i in x.data[np.asarray(keep.data)].tolist()])
            params, state = step(params, state, batch, mask)
            losses.append(float(state.info.value))
        if "save" in request and jax.process_index() == 0:
            leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves((params, state)))}
            np.savez(request["save"], loader=json.dumps(loader.get_state()), **leaves)
    params = jax.tree.map(lambda x: np.asarray(x).tolist(), params)
    result = {"sizes": sizes, "losses": losses, "local": local, "params": params}
    print(json.dumps({**result, "read": records.read}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
