"""The two ways into `update`, checked, told apart and brought to one form.

Path (a) is given per-example gradients and averages them; path (b) is given the mean gradient and
its variance. From here on there is no difference between the two.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from cabs_jax._arguments import check_parameters, is_traced
from cabs_jax.statistics import (
    GradientMoments,
    PyTree,
    Variance,
    moments_from_per_example,
    tree_sum,
)


class StepMoments(NamedTuple):
    """What one step's batch says, whichever way it was given.

    Attributes:
      mean: Mean gradient, like the parameters.
      value: Mean loss, float32 scalar.
      gradient_variance: Trace of the gradient covariance, float32 scalar; or its diagonal, a
        float32 tree like the parameters.
      count: Number of real examples, int32 scalar; None where path (b) was not told.
      averaged_value: Mean loss of averaged weights on the batch, float32 scalar, or None.
    """

    mean: PyTree
    value: jax.Array
    gradient_variance: PyTree
    count: jax.Array | None  # type: ignore[assignment]
    averaged_value: jax.Array | None = None


def read_moments(
    updates: PyTree,
    params: PyTree,
    axis_name: Hashable | None,
    variance: Variance = "trace",
    *,
    moments: GradientMoments | None = None,
    value: Any = None,
    gradient_variance: PyTree = None,
    count: Any = None,
    averaged_value: Any = None,
    mask: Any = None,
    **unknown: Any,
) -> StepMoments:
    """Returns the moments that the arguments of `update` hold, with the variance asked for.

    Args:
      updates: Per-example gradients (path a) or their mean (path b).
      params: The parameters.
      axis_name: Mapped axis over which path (a) is split.
      variance: Whether the trace or the diagonal of the covariance is asked for.
      moments: What `gradient_moments` returned; in place of all that follow.
      value: Losses of the examples, or their mean.
      gradient_variance: Trace or diagonal of the covariance, on path (b).
      count: Number of real examples, on path (b).
      averaged_value: Mean loss of averaged weights on the same batch; NaN: not measured.
      mask: Which examples are real, on path (a).
      **unknown: Arguments of other transformations, which are ignored.

    Raises:
      TypeError: If a parameter is complex, or `moments` are something else.
      ValueError: If they are incomplete, belong to both paths, or disagree in shape or dtype.
    """
    del unknown
    if params is None:
        raise ValueError(
            "update got params=None: pass the parameters as its third argument, so that "
            "per-example gradients can be told from their mean."
        )
    if moments is not None:
        value, gradient_variance, count, averaged_value = _unpacked(
            moments,
            gradient_variance=gradient_variance,
            count=count,
            averaged_value=averaged_value,
            mask=mask,
        )
    if value is None:
        raise ValueError(
            "update got value=None: pass moments=, what gradient_moments returned, or value=, the "
            "per-example losses or their mean."
        )
    check_parameters(params)
    if not _same_structure(updates, params):
        raise ValueError(
            f"the gradients must be a tree like the parameters, {jax.tree.structure(params)}, got "
            f"{jax.tree.structure(updates)}."
        )
    updates, value = jax.tree.map(jnp.asarray, (updates, value))
    if gradient_variance is None:
        if count is not None:
            raise ValueError(
                f"count={count!r} belongs to mean gradients: pass gradient_variance= with it, "
                "or mask= with per-example gradients."
            )
        read = _average(updates, params, value, mask, axis_name, variance)
        return read._replace(averaged_value=_averaged_value(averaged_value))
    if mask is not None:
        raise ValueError(
            f"mask of shape {jnp.shape(mask)} belongs to per-example gradients: give it to "
            "gradient_moments, and count=moments.count to update."
        )
    read = _pass_on(updates, params, value, gradient_variance, count, variance)
    return read._replace(averaged_value=_averaged_value(averaged_value))


def _unpacked(moments: Any, **given: Any) -> tuple[Any, PyTree, Any, Any]:
    if not isinstance(moments, GradientMoments):
        raise TypeError(
            f"moments must be what gradient_moments returned, got {type(moments).__name__}; with "
            "has_aux=True that is the first of two."
        )
    twice = [name for name, argument in given.items() if argument is not None]
    if twice:
        raise ValueError(f"update got moments= and {twice[0]}=: leave {twice[0]}= out.")
    return moments.value, moments.variance, moments.count, moments.averaged_value


def _averaged_value(averaged_value: Any) -> jax.Array | None:
    if averaged_value is None:
        return None
    array = jnp.asarray(averaged_value, jnp.float32)
    if array.shape != ():
        raise ValueError(
            "averaged_value must be the mean loss of the averaged weights, a scalar, got shape "
            f"{array.shape}."
        )
    return array


def _average(
    grads: PyTree,
    params: PyTree,
    value: jax.Array,
    mask: Any,
    axis_name: Hashable | None,
    variance: Variance,
) -> StepMoments:
    examples = _example_axis(grads, params)
    if value.shape not in ((), (examples,)):
        raise ValueError(
            f"value must be the losses of the {examples} examples, shape ({examples},), or their "
            f"mean, shape (); got shape {value.shape}."
        )
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_ or mask.shape != (examples,):
            raise ValueError(
                f"mask must be boolean of shape ({examples},), got dtype {mask.dtype}, shape "
                f"{mask.shape}."
            )
    losses = jnp.broadcast_to(value, (examples,))
    moments = moments_from_per_example(losses, grads, mask, variance=variance, axis_name=axis_name)
    return StepMoments(moments.mean, moments.value, moments.variance, moments.count)


def _example_axis(grads: PyTree, params: PyTree) -> int:
    first: tuple[str, int] | None = None
    for name, gradient, shape in _named_leaves(grads, params):
        if gradient.ndim == 0 or gradient.shape[1:] != shape:
            raise ValueError(
                f"gradient{name} has shape {gradient.shape} where per-example gradients of its "
                f"parameter, of shape {shape}, have a leading example axis. Pass "
                "gradient_variance= if these are mean gradients."
            )
        first = first or (name, gradient.shape[0])
        if gradient.shape[0] != first[1]:
            raise ValueError(
                f"per-example gradients disagree on the number of examples: gradient{first[0]} "
                f"has {first[1]}, gradient{name} has {gradient.shape[0]}."
            )
    if first is None:
        raise ValueError(f"there is no gradient to average in {grads!r}.")
    return first[1]


def _pass_on(
    mean: PyTree,
    params: PyTree,
    value: jax.Array,
    gradient_variance: PyTree,
    count: Any,
    variance: Variance,
) -> StepMoments:
    for name, gradient, shape in _named_leaves(mean, params):
        if gradient.shape != shape:
            raise ValueError(
                f"gradient{name} has shape {gradient.shape} and its parameter {shape}: "
                "with gradient_variance= update takes the mean gradient. Leave gradient_variance "
                "out to pass per-example gradients."
            )
    if value.shape != ():
        raise ValueError(
            f"value must be the mean loss, a scalar, where gradient_variance is given; got shape "
            f"{value.shape}."
        )
    if count is not None:
        count = jnp.asarray(count)
        if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
            raise ValueError(
                f"count must be an integer scalar, got dtype {count.dtype}, shape {count.shape}."
            )
        if not is_traced(count) and count < 0:
            raise ValueError(f"count must be the number of real examples, got {count}.")
        count = count.astype(jnp.int32)
    covariance = _covariance(gradient_variance, params, variance)
    return StepMoments(mean, value.astype(jnp.float32), covariance, count)


def _covariance(gradient_variance: PyTree, params: PyTree, variance: Variance) -> PyTree:
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient_variance)
    if variance == "trace" and isinstance(given, jax.Array) and given.shape == ():
        return given
    shapes, expected = (list(map(jnp.shape, jax.tree.leaves(x))) for x in (given, params))
    if shapes != expected or not _same_structure(given, params):
        the_trace = "the trace, a scalar, or " if variance == "trace" else ""
        raise ValueError(
            f"gradient_variance must be {the_trace}the diagonal, a tree like the "
            f"parameters, with leaves of shapes {expected}; got leaves of shapes {shapes}. It is "
            'what gradient_moments(loss_fn, variance="diagonal") gives. In masked or partition a '
            "diagonal needs mask_compatible_extra_args=True."
        )
    return tree_sum(given) if variance == "trace" else given


def _same_structure(tree: PyTree, other: PyTree) -> bool:
    structure: Any = jax.tree.structure(tree)  # its stub has no ==
    return bool(structure == jax.tree.structure(other))


def _named_leaves(grads: PyTree, params: PyTree) -> list[tuple[str, jax.Array, tuple[int, ...]]]:
    named, leaves = jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params)
    return [(keystr(path), g, jnp.shape(p)) for (path, g), p in zip(named, leaves, strict=True)]
