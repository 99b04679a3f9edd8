"""The two ways into `update`, checked, told apart and brought to one form.

Path (a) is given per-example gradients and averages them; path (b) is given the mean gradient and
its variance. From here on there is no difference between the two. A mean gradient alone will do for
a rule that asks for neither loss nor variance.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from cabs_jax._arguments import check_parameters, is_traced
from cabs_jax.statistics import (
    GradientMoments,
    PyTree,
    Variance,
    measured,
    moments_from_per_example,
    tree_dot,
    tree_squared_norm,
    tree_sum,
)

# How far a rescaled gradient may be from a multiple of the measured one, as a part of its norm:
# bfloat16 rounds each entry by up to 0.4 %.
_NO_RESCALING = 0.01


class StepMoments(NamedTuple):
    """What one step's batch says, whichever way it was given.

    Attributes:
      mean: Mean gradient to pass on, like the parameters.
      value: Mean loss, float32 scalar; None where none was given.
      gradient_variance: Trace of the gradient covariance, float32 scalar; or its diagonal, a
        float32 tree like the parameters; None where none was given.
      trace: The trace ξ in any case, or None.
      squared_norm: ‖ḡ‖² of the gradient as measured, float32 scalar.
      count: Number of real examples, int32 scalar; None where path (b) was not told.
      averaged_value: Mean loss of averaged weights on the batch, float32 scalar, or None.
      gradient_scale: s where what stands before has made s·ḡ of the measured gradient ḡ, float32
        scalar.
      altered: Whether it has made something else of it, a boolean scalar.
    """

    mean: PyTree
    value: jax.Array | None
    gradient_variance: PyTree
    trace: jax.Array | None
    squared_norm: jax.Array
    count: jax.Array | None  # type: ignore[assignment]
    averaged_value: jax.Array | None
    gradient_scale: jax.Array
    altered: jax.Array


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
      gradient_variance: Trace of the covariance, in all or by parameter, or its diagonal, on path
        (b).
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
    params = _with_gradients(params, updates)
    check_parameters(params)
    if not same_structure(updates, params):
        raise ValueError(
            f"the gradients must be a tree like the parameters, {jax.tree.structure(params)}, got "
            f"{jax.tree.structure(updates)}."
        )
    measured_mean = None
    if moments is not None:
        check_moments(
            moments,
            gradient_variance=gradient_variance,
            count=count,
            averaged_value=averaged_value,
            mask=mask,
        )
        value, count, averaged_value = moments.value, moments.count, moments.averaged_value
        measured_mean, gradient_variance = moments.mean, moments.variance
        if same_structure(gradient_variance, measured_mean):
            measured_mean = _visible(measured_mean, params)
            gradient_variance = _visible(gradient_variance, params)
    updates = jax.tree.map(jnp.asarray, updates)
    averaged_value = _averaged_value(averaged_value)
    one_loss = value is None or jnp.shape(value) == ()
    if gradient_variance is None and not (one_loss and _is_mean(updates, params)):
        if count is not None:
            raise ValueError(
                f"count={count!r} belongs to mean gradients: pass gradient_variance= with it, "
                "or mask= with per-example gradients."
            )
        losses = jnp.asarray(measured(value, "value"))
        read = _average(updates, params, losses, mask, axis_name, variance)
        return read._replace(averaged_value=averaged_value)
    if mask is not None:
        raise ValueError(
            f"mask of shape {jnp.shape(mask)} belongs to per-example gradients: give it to "
            "gradient_moments, and count=moments.count to update."
        )
    if gradient_variance is not None:
        measured(value, "value")
    read = _pass_on(updates, params, value, gradient_variance, count, variance)
    read = read._replace(averaged_value=averaged_value)
    if measured_mean is None:
        return read
    scale, altered = _rescaling(updates, _visible(measured_mean, params))
    norm = tree_squared_norm(measured_mean)
    return read._replace(squared_norm=norm, gradient_scale=scale, altered=altered)


def check_moments(moments: Any, **given: Any) -> None:
    """Raises unless `moments` are moments, and none of the other arguments is given with them."""
    if not isinstance(moments, GradientMoments):
        raise TypeError(
            f"moments must be what gradient_moments returned, got {type(moments).__name__}; with "
            "has_aux=True that is the first of two."
        )
    twice = [name for name, argument in given.items() if argument is not None]
    if twice:
        raise ValueError(f"update got moments= and {twice[0]}=: leave {twice[0]}= out.")


def read_count(count: Any) -> jax.Array:
    """Returns a number of examples as an int32 scalar.

    Raises:
      ValueError: If it is none.
    """
    number = jnp.asarray(count)
    if number.shape != () or not jnp.issubdtype(number.dtype, jnp.integer):
        raise ValueError(
            f"count must be an integer scalar, got dtype {number.dtype}, shape {number.shape}."
        )
    if not is_traced(number) and number < 0:
        raise ValueError(f"count must be the number of real examples, got {number}.")
    return number.astype(jnp.int32)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _visible(tree: PyTree, params: PyTree) -> PyTree:
    """Returns a tree without what `optax.masked` or `optax.partition` hides of the parameters."""
    if not any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        return tree
    return jax.tree.map(lambda p, x: p if _is_masked(p) else x, params, tree, is_leaf=_is_masked)


def _with_gradients(params: PyTree, updates: PyTree) -> PyTree:
    """Returns the parameters without those that have None for a gradient."""
    given: Any = jax.tree.structure(updates, is_leaf=_is_none)  # its stub has no ==
    if given != jax.tree.structure(params, is_leaf=_is_none):
        return params
    return jax.tree.map(lambda g, p: None if g is None else p, updates, params, is_leaf=_is_none)


def _is_none(node: Any) -> bool:
    return node is None


def _is_mean(grads: PyTree, params: PyTree) -> bool:
    shapes = [(jnp.shape(g), p) for _, g, p in _named_leaves(grads, params)]
    return bool(shapes) and all(g == p for g, p in shapes)


def _rescaling(seen: PyTree, measured_mean: PyTree) -> tuple[jax.Array, jax.Array]:
    """Returns s ≥ 0, by which the gradient that is seen is a multiple of the measured one.

    And whether it is none.
    """
    leaves, measured_leaves = jax.tree.leaves(seen), jax.tree.leaves(measured_mean)
    if len(leaves) == len(measured_leaves) and all(map(operator.is_, leaves, measured_leaves)):
        return jnp.ones((), jnp.float32), jnp.zeros((), jnp.bool_)
    if not same_structure(seen, measured_mean):
        raise ValueError(
            f"moments.mean must be a tree like the gradients, {jax.tree.structure(seen)}, got "
            f"{jax.tree.structure(measured_mean)}."
        )
    norm = tree_squared_norm(measured_mean)
    scale = tree_dot(seen, measured_mean) / jnp.where(norm > 0, norm, 1)
    scale = jnp.where(norm > 0, scale, 1)

    def rest(u: jax.Array, g: jax.Array) -> jax.Array:
        return u.astype(jnp.float32) - scale * g.astype(jnp.float32)

    residual = tree_squared_norm(jax.tree.map(rest, seen, measured_mean))
    rescaled = (residual <= _NO_RESCALING**2 * tree_squared_norm(seen)) & (scale >= 0)
    return jnp.where(rescaled, scale, 1), ~rescaled


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
    return _as_given(moments.mean, moments.value, moments.variance, moments.count)


def _as_given(
    mean: PyTree, value: jax.Array | None, gradient_variance: PyTree, count: jax.Array | None
) -> StepMoments:
    """Returns the moments of a gradient that nothing stands before, as far as one can see."""
    trace = None if gradient_variance is None else tree_sum(gradient_variance)
    return StepMoments(
        mean,
        value,
        gradient_variance,
        trace,
        squared_norm=tree_squared_norm(mean),
        count=count,
        averaged_value=None,
        gradient_scale=jnp.ones((), jnp.float32),
        altered=jnp.zeros((), jnp.bool_),
    )


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
    value: Any,
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
    if value is not None:
        value = jnp.asarray(value)
        if value.shape != ():
            raise ValueError(
                "value must be the mean loss, a scalar, where gradient_variance is given; got "
                f"shape {value.shape}."
            )
        value = value.astype(jnp.float32)
    covariance = None
    if gradient_variance is not None:
        covariance = _covariance(gradient_variance, params, variance)
    return _as_given(mean, value, covariance, None if count is None else read_count(count))


def _covariance(gradient_variance: PyTree, params: PyTree, variance: Variance) -> PyTree:
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient_variance)
    if variance == "trace" and isinstance(given, jax.Array) and given.shape == ():
        return given
    shapes, expected = (list(map(jnp.shape, jax.tree.leaves(x))) for x in (given, params))
    by_parameter = variance == "trace" and shapes == [()] * len(expected)
    if not (shapes == expected or by_parameter) or not same_structure(given, params):
        the_trace = "the trace, in all or by parameter, or " if variance == "trace" else ""
        raise ValueError(
            f"gradient_variance must be {the_trace}the diagonal, a tree like the "
            f"parameters, with leaves of shapes {expected}; got leaves of shapes {shapes}. It is "
            'what gradient_moments(loss_fn, variance="diagonal") gives. In masked or partition a '
            "diagonal needs mask_compatible_extra_args=True."
        )
    return tree_sum(given) if variance == "trace" else given


def same_structure(tree: PyTree, other: PyTree) -> bool:
    """Returns whether two trees have the same structure."""
    structure: Any = jax.tree.structure(tree)  # its stub has no ==
    return bool(structure == jax.tree.structure(other))


def _named_leaves(grads: PyTree, params: PyTree) -> list[tuple[str, jax.Array, tuple[int, ...]]]:
    named, leaves = jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params)
    return [(keystr(path), g, jnp.shape(p)) for (path, g), p in zip(named, leaves, strict=True)]
