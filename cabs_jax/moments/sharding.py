"""Where a batch is split over devices: reading it off, and working per shard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax.moments import jaxprs
from cabs_jax.moments.target import AxisNames, Platform, Target, platform_named
from cabs_jax.statistics import PyTree

SPLIT, WHOLE = "split", "whole"


def as_axis_names(axis_name: AxisNames | None) -> tuple[str, ...]:
    """Returns the mesh axes as a tuple, empty for None.

    >>> as_axis_names("data"), as_axis_names(None)
    (('data',), ())
    """
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def vary(tree: PyTree, axis_names: tuple[str, ...]) -> PyTree:
    """Marks replicated arrays as varying over axes of the enclosing shard_map.

    The cotangent of an array that is replicated there is summed over devices; of one that varies
    it is not, which is what per-example gradients need.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(name for name in axis_names if name not in jaxprs.varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axis_names else tree


def explicit_batch_axes(batch: PyTree) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """Returns the mesh and the Explicit mesh axes that split the leading axis of a batch.

    Arrays on Auto axes do not show their sharding under jit: for them, and for unsharded ones,
    the result is (None, ()).
    """
    for leaf in jax.tree.leaves(batch):
        sharding = jax.typeof(leaf).sharding
        mesh = sharding.mesh
        if mesh.empty or not leaf.ndim or sharding.spec[0] is None:
            continue
        types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        names = as_axis_names(sharding.spec[0])
        if all(types[name] == AxisType.Explicit for name in names):
            return mesh, names
    return None, ()


def resolve(
    mesh: Mesh | None, axis_name: AxisNames | None, batch: PyTree
) -> tuple[Mesh | AbstractMesh | None, tuple[str, ...]]:
    """Decides over which mesh axes to work per shard: as told, else as an Explicit mesh shows.

    Returns:
      The mesh to wrap a shard_map around (None: none is needed, or the caller's is already
      there), and the axes that split the batch.

    Raises:
      ValueError: If the mesh has several axes and none was named.
    """
    names = as_axis_names(axis_name)
    if mesh is None:
        return (None, names) if names else explicit_batch_axes(batch)
    if names or len(mesh.axis_names) == 1:
        return mesh, names or tuple(mesh.axis_names)
    raise ValueError(
        f"the mesh has axes {mesh.axis_names}: say which of them split the batch,"
        ' for example axis_name="data".'
    )


def check_spmd(
    spmd_axis_name: AxisNames | None, mesh: Mesh | None, axis_name: AxisNames | None
) -> None:
    """Raises ValueError if the compiler is told to split what is already split by hand."""
    if spmd_axis_name is not None and (mesh is not None or axis_name is not None):
        raise ValueError(
            f"spmd_axis_name={spmd_axis_name!r} leaves the batch to the compiler, while mesh= and"
            " axis_name= work on each shard by itself: pass the one or the others."
        )


def target(
    platform: Platform | None,
    mesh: Mesh | AbstractMesh | None,
    axis_names: tuple[str, ...],
    spmd_axis_name: AxisNames | None,
    operands: PyTree,
) -> Target:
    """Finds out what is compiled for, and over how many devices the batch may be split unseen.

    Args:
      platform: What the caller says.
      mesh: The mesh that `resolve` found, which knows its devices.
      axis_names: The axes that split the batch within a shard_map; empty outside.
      spmd_axis_name: The axes that split it outside.
      operands: Arrays, which know the mesh they are on, if not always the axes that split them.

    Raises:
      ValueError: If `spmd_axis_name` is not for the mesh that the operands are on.
    """
    spmd, known = as_axis_names(spmd_axis_name), mesh or jaxprs.visible_mesh(operands)
    if known is not None and spmd:
        _check_left_to_the_compiler(spmd, known)
    said = platform or (jaxprs.platform(known) if known is not None else None)
    named = platform_named(said or jax.default_backend())
    if axis_names:
        lanes = 1
    elif known is not None:
        kinds = zip(known.axis_names, known.axis_types, strict=True)
        unseen = spmd or [name for name, kind in kinds if kind == AxisType.Auto]
        lanes = math.prod(known.shape[name] for name in unseen)
    else:
        # Arrays that a jit takes from the host and spreads by itself do not know their mesh.
        lanes = 1 if platform else jax.device_count()
    return Target(named, lanes, spmd or None)


def _check_left_to_the_compiler(axis_names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> None:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for name in axis_names:
        if name not in kinds:
            raise ValueError(f"spmd_axis_name={name!r} is no axis of the mesh {mesh.axis_names}.")
        if kinds[name] == AxisType.Explicit:
            raise ValueError(
                f"spmd_axis_name={name!r} is for Auto axes, and {name!r} is Explicit: leave it out,"
                " since there the sharding of the batch is visible."
            )


def per_shard(
    function: Callable[..., PyTree],
    mesh: Mesh | AbstractMesh,
    axis_names: tuple[str, ...],
    out_specs: PyTree,
    params_specs: PyTree = WHOLE,
) -> Callable[..., PyTree]:
    """Wraps `function(params, *batches)` in a shard_map over the batch axes of the mesh.

    What varies over devices is not tracked inside: the user's loss need not know that it runs
    there, and may for example start a scan with zeros.

    Args:
      function: Sees its part of the parameters and its shard of every batch.
      mesh: The mesh; axes other than `axis_names` stay with the compiler.
      axis_names: Axes that split the leading axis of the batches.
      out_specs: A tree prefix of the output: `SPLIT` where there is a leading example axis,
        `WHOLE` where every device holds the same, or a `PartitionSpec`.
      params_specs: A tree prefix of the parameters, likewise.
    """
    split: Any = P(axis_names)

    def spec(said: str | P) -> Any:
        return split if said == SPLIT else P() if said == WHOLE else said

    def needed(said: str | P, tree: PyTree) -> PyTree:
        return unsplit(tree, axis_names) if said == WHOLE else tree

    def wrapped(params: PyTree, *batches: PyTree) -> PyTree:
        params = jax.tree.map(needed, params_specs, params)
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(jax.tree.map(spec, params_specs), *(split for _ in batches)),
            out_specs=jax.tree.map(spec, out_specs),
            axis_names=set(axis_names),
            check_vma=False,
        )
        # Outside of jit, untracked axes cannot be left to the compiler.
        return jax.jit(mapped)(params, *batches)

    return wrapped


def unsplit(tree: PyTree, axis_names: tuple[str, ...]) -> PyTree:
    """Gathers what is split over Explicit axes; over Auto ones JAX does so where it needs to."""

    def whole(x: jax.Array) -> jax.Array:
        shown = jax.typeof(x).sharding
        split = [as_axis_names(entry) for entry in shown.spec]
        left = [tuple(name for name in names if name not in axis_names) for names in split]
        if left == split:
            return x
        spec = P(*(names or None for names in left))
        moved: jax.Array = jax.sharding.reshard(x, NamedSharding(shown.mesh, spec))
        return moved

    return jax.tree.map(whole, tree)
