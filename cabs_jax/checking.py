"""Whether a loss of single examples is the loss that is meant, seen once before training."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cabs_jax.moments import parameters, per_example_value_and_grad, sharding
from cabs_jax.moments.jaxprs import name, subjaxprs
from cabs_jax.moments.parameters import of_parameters
from cabs_jax.moments.per_example import batch_size_of
from cabs_jax.moments.randomness import keys_of_examples, with_key
from cabs_jax.statistics import PyTree, moments_from_per_example, tree_squared_norm

# A number of examples that nothing else in a model has, by which a batch axis is known.
_UNLIKELY = 1_009


def check_loss(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batch: PyTree,
    batch_loss: Callable[[PyTree, PyTree], jax.Array] | None = None,
    *,
    rng: jax.Array | None = None,
) -> None:
    """Raises where the loss of single examples is not what one thinks; for the start of a script.

    It sees losses and gradients that are not finite, state outside of the loss that it changes,
    random numbers that all examples share (of which it warns), and, given the loss of a batch that
    trained before, whether the mean over single examples is the same loss with the same gradient.
    Only that comparison can see batch normalisation, under which a loss of one example normalises
    by that example alone. All gradients of the batch are held at once: a dozen examples will do.

    Args:
      loss_fn: `(params, example) -> loss`, as `gradient_moments` takes it.
      params: Parameters; trained a little, if a fresh model answers the same to everything.
      batch: A few examples, stacked along a leading axis.
      batch_loss: `(params, batch) -> loss`, the mean loss of a batch.
      rng: A key, for a loss of `(params, example, rng)`. What it draws has to average out, or be
        switched off, for its mean to be `batch_loss`.

    Raises:
      TypeError: If loss_fn returns no floating-point scalar, or changes a module of flax nnx.
      ValueError: With the numbers that disagree and what that usually means.

    Warns:
      UserWarning: If losses are of less than 32 bits, or examples share their random numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> check_loss(
      ...     lambda w, row: jnp.sum((w - row) ** 2), jnp.zeros(3), x,
      ...     batch_loss=lambda w, rows: jnp.mean(jnp.sum((w[None] - rows) ** 2, axis=1)))
    """
    size, parts = batch_size_of(batch), parameters.split(params)
    # Where shardings are visible, a loss of one example need not know how to index split arrays.
    axis_names = sharding.explicit_batch_axes(batch)[1]
    trained, arrays, batch = sharding.unsplit((parts.parameters, parts.arrays, batch), axis_names)
    params = parts.rebuild(trained, arrays)
    losses, grads = jax.jit(per_example_value_and_grad(loss_fn))(params, batch, rng=rng)
    moments = moments_from_per_example(losses, grads)
    low_precision = losses.dtype.itemsize < 4
    if low_precision:
        warnings.warn(
            f"the losses are {losses.dtype}: compute them in float32, from outputs cast by "
            "astype(float32), or averages of them know no more than two or three digits.",
            stacklevel=2,
        )
    if not jnp.isfinite(losses).all():
        wrong = jnp.flatnonzero(~jnp.isfinite(losses))[:5].tolist()
        raise ValueError(
            f"the losses of examples {wrong} are not finite: {losses[jnp.array(wrong)]}."
        )
    if not jnp.isfinite(tree_squared_norm(grads)):
        raise ValueError("the losses are finite, but some of their gradients are not.")
    loss_of_tree = loss_fn if rng is None else with_key(loss_fn)
    of_example = of_parameters(loss_of_tree, parts, arrays)

    def all_losses(params: PyTree, batch: PyTree) -> Any:
        if rng is not None:
            keep = jnp.ones(batch_size_of(batch), jnp.bool_)
            batch = batch, keys_of_examples(rng, keep, ())
        return jax.vmap(of_example, (None, 0))(params, batch)

    _check_state(all_losses, trained, batch)
    _check_randomness(all_losses, trained, batch)
    if batch_loss is not None:
        coarse = low_precision or any(x.dtype.itemsize < 4 for x in jax.tree.leaves(grads))
        tolerance = 0.03 if coarse else 1e-3
        of_batch = of_parameters(batch_loss, parts, arrays)
        _compare(of_batch, trained, batch, moments.value, moments.mean, size, tolerance)


def _check_state(losses: Callable[..., Any], params: PyTree, batch: PyTree) -> None:
    def program() -> tuple[str, list[bytes]]:
        traced_anew = functools.partial(losses)  # a known function would not be called again
        closed = jax.make_jaxpr(traced_anew)(params, batch)
        consts = [jax.random.key_data(x) if is_key(x) else x for x in closed.consts]
        # Functions within are made anew by every trace, at another address.
        return re.sub(r" at 0x\w+", "", str(closed)), [np.asarray(x).tobytes() for x in consts]

    def is_key(x: Any) -> bool:
        return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))

    try:
        with jax.checking_leaks():
            first = program()
    except Exception as error:
        if not str(error).startswith("Leaked"):
            raise
        raise ValueError(
            "loss_fn keeps a value of its own in something outside of it, such as a list or an "
            "attribute, where no number ever arrives: return it as aux, with has_aux=True."
        ) from error
    if program() != first:
        raise ValueError(
            "loss_fn is another function at its second call: it changes something outside of it, "
            "such as a counter, or draws from numpy or random. jax.jit keeps what it saw first. "
            "Pass what changes as an argument, and draw from jax.random by the key of rng=."
        )


def _check_randomness(losses: Callable[..., Any], params: PyTree, batch: PyTree) -> None:
    def many(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((_UNLIKELY, *x.shape[1:]), x.dtype)

    jaxpr = jax.make_jaxpr(losses)(params, jax.tree.map(many, batch))
    if _draws_once_for_all(jaxpr.jaxpr):
        warnings.warn(
            "loss_fn draws the same random numbers for every example, as from a key that it closes "
            "over: if that is dropout or augmentation, gradients differ less than they should. "
            "Take the key as an argument, loss_fn(params, example, rng), and pass rng= beside the "
            "batch: each example is then given a key of its own.",
            stacklevel=3,
        )


def _draws_once_for_all(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if name(equation) == "random_bits" and _UNLIKELY not in equation.invars[0].aval.shape:
            return True
        if any(map(_draws_once_for_all, subjaxprs(equation))):
            return True
    return False


def _compare(
    batch_loss: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    mean_loss: jax.Array,
    mean_gradient: PyTree,
    size: int,
    tolerance: float,
) -> None:
    value, gradient = jax.jit(jax.value_and_grad(batch_loss))(params, batch)
    usual = (
        "Usual reasons: batch normalisation, which normalises a single example by itself; a "
        "penalty, dropout or weights in only one of the two."
    )
    if jnp.abs(value - mean_loss) > tolerance * jnp.maximum(jnp.abs(value), jnp.abs(mean_loss)):
        if jnp.abs(value - size * mean_loss) <= tolerance * jnp.abs(value):
            usual = "It is the sum over the examples: divide it by their number."
        raise ValueError(
            f"the loss of the batch is {value:.6g}, and the mean of the losses of its {size} "
            f"examples {mean_loss:.6g}. {usual}"
        )
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    norm = tree_squared_norm(gradient)
    error = tree_squared_norm(jax.tree.map(jnp.subtract, gradient, mean_gradient))
    if error > (10 * tolerance) ** 2 * norm:
        raise ValueError(
            f"the losses agree, but their gradients do not: that of the batch has norm "
            f"{jnp.sqrt(norm):.6g}, and the mean of its examples' is {jnp.sqrt(error):.6g} away. "
            f"{usual} Or a stop_gradient, or a custom derivative."
        )
