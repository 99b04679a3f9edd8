"""Tells the parameters of a loss from whatever else is in the tree that it is given.

Its floating-point arrays are the parameters. A whole module holds more: numbers, functions, keys
for random numbers, running averages. None of these has a gradient, and the moments have None in
their place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from cabs_jax._arguments import check_parameters
from cabs_jax.moments import jaxprs
from cabs_jax.statistics import PyTree

LossAndAux: TypeAlias = Callable[..., tuple[jax.Array, PyTree]]
Result = TypeVar("Result")
ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


class Split(NamedTuple):
    """A tree, split into its parameters and the rest.

    Attributes:
      parameters: The tree with None for what is no parameter.
      arrays: Its other arrays, in order.
      rebuild: `(parameters, arrays) -> tree`, with everything else in its place.
      keys: Paths of the arrays that may be keys for random numbers.
    """

    parameters: PyTree
    arrays: list[Any]
    rebuild: Callable[[PyTree, Sequence[Any]], PyTree]
    keys: tuple[str, ...]


def split(tree: PyTree) -> Split:
    """Splits what a loss is given as its parameters.

    >>> import jax.numpy as jnp
    >>> parts = split({"w": jnp.ones(2), "steps": jnp.arange(3), "name": "net"})
    >>> parts.parameters
    {'name': None, 'steps': None, 'w': Array([1., 1.], dtype=float32)}
    >>> parts.rebuild({"name": None, "steps": None, "w": "new"}, parts.arrays)
    {'name': 'net', 'steps': Array([0, 1, 2], dtype=int32), 'w': 'new'}

    Raises:
      TypeError: If there is no parameter, or one that is complex, or an object that holds one.
    """
    treedef: Any  # its stub has no methods
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in named]
    nodes = jax.tree.leaves(tree, is_leaf=_is_variable)
    state = [_is_state(node) for node in nodes for _ in jax.tree.leaves(node)]
    for path, leaf in named:
        if not _is_array(leaf) and (hasattr(leaf, "__jax_array__") or hasattr(leaf, "__array__")):
            raise TypeError(
                f"parameter {keystr(path)} is a {type(leaf).__name__} and not an array: pass what"
                " it holds, as in [v.value for v in model.trainable_variables]."
            )
    arrays = [_is_array(leaf) for leaf in leaves]
    trained = [a and not s for a, s in zip(arrays, state, strict=True)]
    check_parameters(treedef.unflatten(_only(leaves, trained)))
    floating = [t and _is_floating(leaf) for t, leaf in zip(trained, leaves, strict=True)]
    if leaves and not any(floating):
        found = ", ".join(sorted({_kind(leaf) for leaf in leaves}))
        raise TypeError(
            f"there is no floating-point array among the parameters, only {found}: pass arrays, for"
            " example those that eqx.partition or nnx.split takes out of a module."
        )
    others = [a and not f for a, f in zip(arrays, floating, strict=True)]

    def rebuild(parameters: PyTree, arrays: Sequence[Any]) -> PyTree:
        given, held = iter(jax.tree.leaves(parameters)), iter(arrays)
        choices = zip(leaves, floating, others, strict=True)
        return treedef.unflatten(
            [next(given) if f else next(held) if o else leaf for leaf, f, o in choices]
        )

    return Split(
        treedef.unflatten(_only(leaves, floating)),
        [leaf for leaf, other in zip(leaves, others, strict=True) if other],
        rebuild,
        tuple(keystr(path) for (path, x), o in zip(named, others, strict=True) if o and _is_key(x)),
    )


def check_like(averaged_params: PyTree, params: PyTree) -> None:
    """Raises ValueError unless averaged parameters have the shapes of the parameters."""
    shapes, wanted = (
        [(keystr(path), x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (averaged_params, params)
    )
    if shapes != wanted:
        raise ValueError(
            f"averaged_params must be a tree like the parameters, of shapes {wanted}, got shapes "
            f"{shapes}."
        )


def of_parameters(
    loss_fn: Callable[[PyTree, PyTree], Result], parts: Split, arrays: Sequence[Any]
) -> Callable[[PyTree, PyTree], Result]:
    """The loss as a function of the parameters alone, with these in place of the other arrays."""

    def loss_of_parameters(parameters: PyTree, example: PyTree) -> Result:
        tree = parts.rebuild(parameters, arrays)
        before = _averages(tree)
        result = loss_fn(tree, example)
        for (kind, old), (_, new) in zip(before, _averages(tree), strict=True):
            if old is not new:
                raise TypeError(
                    f"the loss changes a {kind} of its module, for each example by itself, and the"
                    " change would be lost: let it run in evaluation mode, as after model.eval()."
                )
        return result

    return loss_of_parameters


def check_randomness(
    loss_fn: LossAndAux, parts: Split, arrays: Sequence[Any], batch: PyTree
) -> None:
    """Raises TypeError if a loss draws random numbers that are the same for every example.

    That is so where they depend on a key among the parameters and not on the example.
    """
    if not parts.keys:
        return

    def of_all(parameters: PyTree, arrays: Sequence[Any], example: PyTree) -> PyTree:
        return of_parameters(loss_fn, parts, arrays)(parameters, example)

    shared, example = (parts.parameters, arrays), jaxprs.first(batch)
    closed, _ = jaxprs.trace(of_all, *shared, example)
    inputs = [True] * len(jax.tree.leaves(shared)) + [False] * len(jax.tree.leaves(example))
    if jaxprs.any_of_inputs_alone(closed, inputs, lambda e: jaxprs.name(e) == "random_bits"):
        raise TypeError(
            "the loss draws random numbers that are the same for all examples, such as one dropout"
            f" mask for the whole batch, by a key among the parameters: {', '.join(parts.keys)}."
            " Draw by the key that loss_fn(params, example, rng) is given where the call has rng=,"
            " as after nnx.reseed(model, default=rng), or draw none, as after model.eval()."
        )


def _only(leaves: list[Any], chosen: list[bool]) -> list[Any]:
    return [leaf if c else None for leaf, c in zip(leaves, chosen, strict=True)]


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that JAX can hold."""
    kinds = jnp.number, jnp.bool_, jax.dtypes.extended
    return isinstance(leaf, ARRAYS) and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _is_key(leaf: Any) -> bool:
    """Whether an array may be a key, of the typed or of the raw kind."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype == jnp.uint32)


def _kind(leaf: Any) -> str:
    return str(leaf.dtype) if _is_array(leaf) else type(leaf).__name__


def _is_variable(node: Any) -> bool:
    """Whether a node is a variable of flax nnx, which is known if there is one."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _is_state(node: Any) -> bool:
    """Whether a node is a variable that is no parameter, such as a running average."""
    return _is_variable(node) and not isinstance(node, sys.modules["flax.nnx"].Param)


def _averages(tree: PyTree) -> list[tuple[str, Any]]:
    """What the variables that are no parameters hold in floating-point numbers, and their kind."""
    nodes = [n for n in jax.tree.leaves(tree, is_leaf=_is_variable) if _is_state(n)]
    held = [(type(node).__name__, x) for node in nodes for x in jax.tree.leaves(node)]
    return [(kind, x) for kind, x in held if _is_array(x) and _is_floating(x)]
