"""Parameters of which every device holds a part (FSDP), within a shard_map over the batch.

They are gathered where they are used and no earlier: a layer of a scan at its own step, and once
more in the backward pass rather than kept. What comes back for the whole is added up over devices,
in float32 unless told otherwise, and each is left with its own part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cabs_jax.moments.sharding import SPLIT, WHOLE, as_axis_names
from cabs_jax.moments.target import AxisNames, Target
from cabs_jax.statistics import GradientMoments, PyTree, Variance, WeightSums, squares_of


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array lies on the devices of a shard_map.

    Attributes:
      axes: For each dimension the mesh axes that split it, none or more.
      dtype: What the array is cast to before it is gathered.
      reduce_dtype: What its cotangents are cast to before they are added up; None for float32.
      scatters: Whether sums are added up and scattered in one.
    """

    axes: tuple[tuple[str, ...], ...]
    dtype: Any
    reduce_dtype: Any = None
    scatters: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All mesh axes that split it."""
        return tuple(name for names in self.axes for name in names)

    def of_a_step(self) -> Layout:
        """The layout of what a step of a scan over the first dimension, which is whole, sees."""
        return dataclasses.replace(self, axes=self.axes[1:])

    def exact(self) -> Layout:
        """The layout of an array of the same shape that is gathered and added up in float32."""
        return dataclasses.replace(self, dtype=jnp.float32, reduce_dtype=None)


Layouts = tuple[Layout | None, ...]


def gathered(layout: Layout | None, shard: jax.Array) -> jax.Array:
    """The whole of an array, whose cotangent is `scattered`."""
    return shard if layout is None else _gathered(layout, shard)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(layout: Layout, shard: jax.Array) -> jax.Array:
    whole = shard.astype(layout.dtype)
    for dimension, names in enumerate(layout.axes):
        if names:
            whole = lax.all_gather(whole, names, axis=dimension, tiled=True)
    return whole


def _forward(layout: Layout, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gathered(layout, shard), shard[:0]  # for its dtype


def _backward(layout: Layout, empty: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (scattered(layout, cotangent).astype(empty.dtype),)


_gathered.defvjp(_forward, _backward)


def scattered(layout: Layout | None, whole: jax.Array) -> jax.Array:
    """The device's part of the sum over devices; without a layout the array as it is."""
    if layout is None:
        return whole
    wide = jnp.promote_types(whole.dtype, jnp.float32)
    shard = whole.astype(wide if layout.reduce_dtype is None else layout.reduce_dtype)
    for dimension, names in enumerate(layout.axes):
        if names and layout.scatters:
            shard = lax.psum_scatter(shard, names, scatter_dimension=dimension, tiled=True)
        elif names:
            shard = _own_part(lax.psum(shard, names), names, dimension)
    return shard.astype(wide)


def _own_part(whole: jax.Array, names: tuple[str, ...], dimension: int) -> jax.Array:
    size = whole.shape[dimension] // lax.axis_size(names)
    start = lax.axis_index(names) * size
    part: jax.Array = lax.dynamic_slice_in_dim(whole, start, size, dimension)
    return part


def squares_of_parts(layouts: Layouts, variance: Variance, tree: PyTree) -> PyTree:
    """`squares_of` a tree like the parameters, of which each device has its part."""
    if variance == "diagonal" or not any(layouts):
        return squares_of(tree, variance)
    treedef: Any
    leaves, treedef = jax.tree.flatten(squares_of(tree, "by_parameter"))
    norms = [
        norm if layout is None else lax.psum(norm, layout.names)
        for norm, layout in zip(leaves, layouts, strict=True)
    ]
    return sum(norms) if variance == "trace" else treedef.unflatten(norms)


def check_specs(param_specs: PyTree, mesh: Mesh | None, method: str) -> None:
    """Raises ValueError if parameters are said to be split where it would not be heeded."""
    if param_specs is None:
        return
    if mesh is None:
        raise ValueError(
            f"param_specs={param_specs!r} goes with mesh=: leave it out where the arrays show how"
            " they are split (Explicit axes) or the compiler sees to it (spmd_axis_name=)."
        )
    if method not in {"auto", "factored"}:
        raise ValueError(
            f'param_specs={param_specs!r} is for method="factored", got method={method!r}, which'
            " holds whole gradients: leave it out, and the parameters are gathered at the start."
        )


def check_reduce_dtype(
    reduce_dtype: DTypeLike | None, spmd_axis_name: AxisNames | None, method: str
) -> None:
    """Raises ValueError if what gradients are added up in is no such dtype, or not heeded."""
    if reduce_dtype is None:
        return
    if not jnp.issubdtype(reduce_dtype, jnp.floating):
        raise ValueError(f"reduce_dtype must be a floating-point dtype, got {reduce_dtype!r}.")
    if spmd_axis_name is not None or method == "per_example":
        raise ValueError(
            f"reduce_dtype={reduce_dtype!r} is heeded with mesh=, axis_name= or visible shardings,"
            ' and not with spmd_axis_name=, nor with method="per_example": leave it out there.'
        )


def read(param_specs: PyTree, params: PyTree, axis_names: tuple[str, ...]) -> PyTree:
    """How parameters are split over some mesh axes: as told, or else as Explicit axes show.

    Returns:
      A tree like the parameters of specs for each of their dimensions, in which no other axes
      occur; None where no parameter is split.
    """
    treedef: Any  # its stub has no methods
    leaves, treedef = jax.tree.flatten(params)
    if param_specs is None:
        specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]
    else:
        specs = jax.tree.leaves(jax.tree.broadcast(param_specs, params))

    def kept(spec: P, leaf: jax.Array) -> P:
        if len(spec) > leaf.ndim:
            raise ValueError(f"param_specs has {spec} for a parameter of shape {leaf.shape}.")
        axes = [tuple(n for n in as_axis_names(entry) if n in axis_names) for entry in spec]
        return P(*axes, *[()] * (leaf.ndim - len(axes)))

    found = [kept(spec, leaf) for spec, leaf in zip(specs, leaves, strict=True)]
    return treedef.unflatten(found) if any(map(any, found)) else None


def layouts_of(
    specs: PyTree, params: PyTree, target: Target, reduce_dtype: DTypeLike | None = None
) -> Layouts:
    """The layouts of parameters by what `read` found, None for those that are not split."""
    if specs is None:
        return ()
    # Between processes on CPU, a large psum_scatter may come out wrong and say nothing of it: seen
    # on jax 0.9.0 and 0.10.1, where parts had 16 MiB (https://github.com/jax-ml/jax/issues/40830).
    scatters = target.platform != "cpu"
    pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(params), strict=True)
    found = [
        Layout(tuple(map(as_axis_names, spec)), x.dtype, reduce_dtype, scatters)
        for spec, x in pairs
    ]
    return tuple(layout if layout.names else None for layout in found)


def specs_for(
    specs: PyTree, averaged_specs: PyTree, variance: Variance, weighted: bool
) -> tuple[PyTree, PyTree]:
    """Specs for `per_shard`, of (params, averaged_params, rng, arrays) and of (moments, aux).

    The mean, and a diagonal variance, are split like the parameters.
    """
    one: Any = WHOLE
    ins = (*(one if s is None else s for s in (specs, averaged_specs)), one, one)
    if specs is None:
        return ins, (WHOLE, SPLIT)
    spread = specs if variance == "diagonal" else one
    weights = WeightSums(one, one, specs) if weighted else None
    moments = GradientMoments(one, specs, spread, one, one, weights)
    return ins, (moments, SPLIT)
