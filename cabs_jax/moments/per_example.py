"""Per-example gradients as they are defined, one gradient per example held in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp

from cabs_jax.moments import parameters, sharding
from cabs_jax.moments.parameters import LossAndAux
from cabs_jax.moments.randomness import check_rng, keys_of_examples, with_key
from cabs_jax.moments.rewriting import without_batched_convolutions
from cabs_jax.moments.target import AxisNames, Target
from cabs_jax.statistics import PyTree

Values_co = TypeVar("Values_co", covariant=True)


class PerExampleFunction(Protocol[Values_co]):
    """`(params, batch) -> (losses, grads)`, with (losses, aux) for losses where there is aux."""

    def __call__(
        self, params: PyTree, batch: PyTree, *, rng: jax.Array | None = None
    ) -> tuple[Values_co, PyTree]:
        """Differentiates the loss of every example of a batch."""


class Placement(TypedDict, total=False):
    """Where the batch is split, as `per_example_value_and_grad` takes it."""

    axis_name: AxisNames | None
    mesh: jax.sharding.Mesh | None
    spmd_axis_name: AxisNames | None


@overload
def per_example_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: Literal[False] = False,
    **placement: Unpack[Placement],
) -> PerExampleFunction[jax.Array]: ...
@overload
def per_example_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: Literal[True],
    **placement: Unpack[Placement],
) -> PerExampleFunction[tuple[jax.Array, PyTree]]: ...
@overload
def per_example_value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool, **placement: Unpack[Placement]
) -> PerExampleFunction[Any]: ...


def per_example_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: AxisNames | None = None,
    mesh: jax.sharding.Mesh | None = None,
    spmd_axis_name: AxisNames | None = None,
) -> PerExampleFunction[Any]:
    """Per-example losses and gradients: what `update` takes when no variance is passed to it.

    The numbers are those of `jax.vmap(jax.value_and_grad(loss_fn), (None, 0))`, which is silently
    wrong for convolutions when the batch is sharded over an Auto mesh (gradients of all examples
    but the first device's come out as zero) and raises on an Explicit mesh. Here convolutions of
    two per-example operands are computed from patches, and on a mesh the work is done per shard:

    * Explicit mesh: nothing to say, the sharding of the batch is visible;
    * Auto mesh: pass `mesh=` (and `axis_name=` where it has more axes than the batch's), since
      under `jit` a traced array does not know its sharding;
    * Auto mesh that also splits the parameters: pass `spmd_axis_name=`, which leaves the work to
      the compiler and tells it to keep the examples where they are;
    * inside your own `shard_map`: pass `axis_name=`.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar loss`, or `(loss, aux)` with `has_aux`;
        `loss_fn(params, example, rng)` where the call is given `rng`.
      has_aux: Whether `loss_fn` returns auxiliary data.
      axis_name: Mesh axis or axes that split the batch.
      mesh: Mesh to work on, one shard of the batch per device.
      spmd_axis_name: Auto mesh axis or axes that split the batch, as in `jax.vmap`.

    Returns:
      A function `(params, batch, *, rng=None) -> (losses, grads)`, or `((losses, aux), grads)`.
      Every leaf of `batch` has shape (m, ...); `losses` has shape (m,); `grads` is a tree like
      `params` with a leading example axis, and None for what is no floating-point array. Of `rng`,
      one key, example i is given `jax.random.fold_in(rng, i)`. Call it under `jax.jit`: on a mesh,
      each uncompiled call compiles.

    Raises:
      TypeError: If the loss is not a scalar, a parameter complex or not an array, or `rng` no key;
        if only one of the loss and the call has it; or if the loss draws random numbers by a key
        that is among the parameters.
      ValueError: If the leaves of the batch disagree on m, the mesh is ambiguous, or
        `spmd_axis_name` names an Explicit axis or comes with one of the others.

    Example:
      >>> import cabs_jax, jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return 0.5 * (params @ example["x"] - example["y"]) ** 2
      >>> batch = {"x": jnp.eye(2), "y": jnp.zeros(2)}
      >>> gradients_of = jax.jit(cabs_jax.per_example_value_and_grad(loss_fn))
      >>> losses, grads = gradients_of(jnp.array([1.0, 2.0]), batch)
      >>> losses.tolist(), grads.tolist()
      ([0.5, 2.0], [[1.0, 0.0], [0.0, 2.0]])
    """
    sharding.check_spmd(spmd_axis_name, mesh, axis_name)
    function = loss_and_aux(loss_fn, has_aux)

    def compute(
        params: PyTree, batch: PyTree, *, rng: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        parts = parameters.split(params)
        check_rng(rng, loss_fn)
        given = parts.parameters, parts.arrays, rng
        mesh_used, axis_names = sharding.resolve(mesh, axis_name, batch)
        target = sharding.target(None, mesh_used, axis_names, spmd_axis_name, (batch, given))

        def on_shard(
            given: tuple[PyTree, list[jax.Array], jax.Array | None], batch: PyTree
        ) -> tuple[Any, PyTree]:
            params, rng = sharding.vary((given[0], given[2]), axis_names)
            loss_of_tree = function
            if rng is not None:
                loss_of_tree = with_key(function)
                keep = sharding.vary(jnp.ones(batch_size_of(batch), jnp.bool_), axis_names)
                batch = batch, keys_of_examples(rng, keep, axis_names)
            parameters.check_randomness(loss_of_tree, parts, given[1], batch)
            loss = parameters.of_parameters(loss_of_tree, parts, given[1])
            return _value_and_grad(loss, params, batch, target)

        if mesh_used is not None:
            on_shard = sharding.per_shard(on_shard, mesh_used, axis_names, sharding.SPLIT)
        (losses, aux), grads = on_shard(given, batch)
        return (losses, aux) if has_aux else losses, grads

    return compute


def batch_size_of(batch: PyTree) -> int:
    """Returns the length of the leading axis that all leaves of a batch share.

    Raises:
      ValueError: If there is no array, the leading axes differ, or they are empty.
    """
    sizes = {
        jax.tree_util.keystr(path): jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ValueError(
            "every leaf of a batch needs the same leading example axis;"
            f" the leading axes here are {sizes or 'none at all'}."
        )
    size = int(next(iter(sizes.values())))  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("the batch holds no examples; to skip a step, mask them all.")
    return size


def loss_and_aux(loss_fn: Callable[..., Any], has_aux: bool) -> LossAndAux:
    """The same per-example loss, checked when it is traced, as one that returns `(loss, aux)`.

    Without auxiliary data, `aux` is (). It raises TypeError if it returns something else.
    """
    loss_fn = _explaining_mutation(loss_fn)

    def checked(params: PyTree, example: PyTree, *rng: jax.Array) -> tuple[jax.Array, PyTree]:
        result = loss_fn(params, example, *rng)
        _check_result(result, has_aux)
        loss, aux = result if has_aux else (result, ())
        return loss, aux

    return checked


def loss_of_one(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Turns a loss of a batch into a loss of one example, given to it as a batch of one."""

    def of_one(params: PyTree, example: PyTree, *rng: jax.Array) -> Any:
        result = loss_fn(params, jax.tree.map(lambda x: x[None], example), *rng)
        loss, aux = result if has_aux else (result, ())
        loss = loss.reshape(()) if loss.size == 1 else loss
        return (loss, aux) if has_aux else loss

    return of_one


def _explaining_mutation(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss, which says what to do where flax nnx refuses to change a module."""

    @functools.wraps(loss_fn)
    def explaining(*args: Any) -> Any:
        try:
            return loss_fn(*args)
        except Exception as error:
            if type(error).__name__ != "TraceContextError":
                raise
            refused = str(error).split(" (")[0]
            raise TypeError(
                f"the loss changes a module that was made outside of it ({refused}). A BatchStat is"
                " of batch normalisation: let it run in evaluation mode, after model.eval(). An"
                " RngCount is of dropout: pass rng= beside the batch, and let loss_fn(params,"
                " example, rng) call model(x, rngs=nnx.Rngs(rng)). Anything else: make the module"
                " inside the loss, nnx.merge(graphdef, params, rest)."
            ) from error

    return explaining


def _check_result(result: Any, has_aux: bool) -> None:
    """Raises TypeError unless a per-example loss is a real scalar, with aux if there should be."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "with has_aux, loss_fn(params, example) must return (loss, aux); it returned"
            f" {type(result).__name__}."
        )
    loss = result[0] if has_aux else result
    if not isinstance(loss, jax.Array):
        raise TypeError(
            "loss_fn(params, example) must return one floating-point scalar per example; it"
            f" returned {type(loss).__name__} (a pair of loss and aux needs has_aux=True)."
        )
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            "loss_fn(params, example) must return one floating-point scalar per example;"
            f" it returned shape {loss.shape} and dtype {loss.dtype}."
        )


def _value_and_grad(
    loss_fn: LossAndAux, params: PyTree, batch: PyTree, target: Target
) -> tuple[Any, PyTree]:
    batch_size_of(batch)
    function = without_batched_convolutions(jax.value_and_grad(loss_fn, has_aux=True))
    result: tuple[Any, PyTree] = target.vmap(function, (None, 0))(params, batch)
    return result
