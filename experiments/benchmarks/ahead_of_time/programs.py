"""What is compiled: the plain step of a net and each way to its gradient moments, and on what."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax
from experiments.benchmarks import _nets
from experiments.benchmarks.ahead_of_time import language_model

PyTree = Any
GROUPS = 8
COLUMNS = ("plain", "trace", "kernels", "trace_mesh", "diagonal", "per_example", "between")
LM_COLUMNS = ("plain", "trace", "kernels", "trace_mesh", "between")
LM_PREFIX = "lm-"


class Work(NamedTuple):
    """A loss, and the shapes of what it is given.

    Attributes:
      loss: `(params, example) -> loss`.
      params: Shapes, dtypes and shardings of the parameters.
      batch: Those of a batch, split over the mesh's only axis.
      spread_loss: The same loss, telling the compiler where activations are; for `jax.vmap` with
        the mesh's axis as `spmd_axis_name`, outside `jax.shard_map`.
      reduce_dtype: What gradients are added up in over devices, where the plain step does so too.
    """

    loss: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    batch: PyTree
    spread_loss: Callable[[PyTree, PyTree], jax.Array]
    reduce_dtype: Any = None


def batch_sizes(net: str) -> tuple[int, ...]:
    """The batch sizes that a net is measured at where none are given."""
    if net.startswith(LM_PREFIX):
        return (language_model.SIZES[net.removeprefix(LM_PREFIX)].batch_size,)
    return (8, 64) if net == "transformer" else (16, 128)


def columns_for(
    columns: Sequence[str], net: str, batch_size: int, devices: int, platform: str
) -> list[str]:
    """Those of `columns` that make sense for a net, "plain" first.

    `kernels` are for TPUs. `trace_mesh` and a language model's `between` need several devices, and
    per-example gradients of a language model fit nowhere.
    """
    allowed = set(LM_COLUMNS if net.startswith(LM_PREFIX) else COLUMNS)
    if platform != "tpu":
        allowed.discard("kernels")
    if devices == 1:
        allowed.discard("trace_mesh")
    if devices == 1 and batch_size % GROUPS:
        allowed.discard("between")
    return ["plain", *(c for c in columns if c in allowed and c != "plain")]


def work(net: str, batch_size: int, mesh: Mesh) -> Work:
    """A net by its name, one of `_nets.NAMES` or "lm-" and one of `language_model.SIZES`.

    On several devices a language model's parameters are sharded over them (FSDP), those of other
    nets replicated.
    """
    split = NamedSharding(mesh, P("data"))
    if net.startswith(LM_PREFIX):
        size = language_model.SIZES[net.removeprefix(LM_PREFIX)]
        params, batch = language_model.shapes(size, batch_size)
        params = jax.tree.map(lambda leaf: _placed(leaf, _fully_sharded(leaf, mesh)), params)
        whole = NamedSharding(mesh, P()) if mesh.size > 1 else None
        losses = language_model.loss_fn(size), language_model.loss_fn(size, whole)
        return Work(losses[0], params, _all(batch, split), losses[1], jnp.bfloat16)
    built = _nets.build(net)
    params = _all(built.params, NamedSharding(mesh, P()))
    return Work(built.loss, params, _all(built.examples(batch_size), split), built.loss)


def program(column: str, work: Work, mesh: Mesh) -> Callable[[PyTree, PyTree], Any]:
    """The function of (params, batch) that a column measures.

    The gradient, and a variance that is like it, keep the sharding of the parameters.
    """
    several = mesh.size > 1
    shardings = jax.tree.map(lambda leaf: leaf.sharding, work.params)
    by_compiler, by_shard = {"spmd_axis_name": "data"}, {"mesh": mesh}
    in_parts = by_shard | {
        "param_specs": jax.tree.map(lambda s: s.spec, shardings),
        "reduce_dtype": work.reduce_dtype,
    }
    options: dict[str, dict[str, Any]] = {
        "trace": by_compiler,
        "kernels": {"kernels": True} | (in_parts if several else {}),
        "trace_mesh": in_parts,
        "diagonal": by_compiler | {"variance": "diagonal"},
        "per_example": by_compiler | {"method": "per_example"},
        "between": {"method": "between"} | (by_shard if several else {"groups": GROUPS}),
    }
    if column == "plain":

        def mean_loss(params: PyTree, batch: PyTree) -> jax.Array:
            losses = jax.vmap(work.spread_loss, (None, 0), spmd_axis_name="data")(params, batch)
            return jnp.mean(losses)

        def plain(params: PyTree, batch: PyTree) -> Any:
            value, mean = jax.value_and_grad(mean_loss)(params, batch)
            return value, jax.lax.with_sharding_constraint(mean, shardings)

        return plain
    loss = work.loss if "mesh" in options[column] else work.spread_loss
    moments_of = cabs_jax.gradient_moments(loss, **options[column])

    def moments(params: PyTree, batch: PyTree) -> Any:
        found = moments_of(params, batch)
        found = found._replace(mean=jax.lax.with_sharding_constraint(found.mean, shardings))
        if column == "diagonal":
            variance = jax.lax.with_sharding_constraint(found.variance, shardings)
            found = found._replace(variance=variance)
        return found

    return moments


def _fully_sharded(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Splits the longest axis that the devices divide, the last of several; else replicates."""
    axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    if not axes:
        return NamedSharding(mesh, P())
    longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
    return NamedSharding(mesh, P(*[None] * longest, "data"))


def _all(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda leaf: _placed(leaf, sharding), tree)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
