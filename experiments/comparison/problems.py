"""The two problems of the main job: one whose loss vanishes, and one whose loss has a floor."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from cabs_jax.statistics import PyTree
from experiments import datasets
from experiments.training import models

PENALTY = 5e-4  # times the squared norm of the weights, biases apart

Loss = Callable[[PyTree, Mapping[str, jax.Array]], jax.Array]


class Problem(NamedTuple):
    """What is to be minimised.

    Attributes:
      title: What it is, for people.
      loss: `(params, example) -> loss` of an `{"input", "label"}`, a float32 scalar.
      data: The training examples.
      starts: Initial parameters, one set for each seed: leaves of shape (seeds, ...).
      optimum: The smallest mean loss over `data`, F*.
      untrained: Mean loss of each of `starts` above the optimum, float32 (seeds,).
    """

    title: str
    loss: Loss
    data: dict[str, jax.Array]
    starts: PyTree
    optimum: float
    untrained: np.ndarray


def clean_digits(seeds: Sequence[int]) -> Problem:
    """Digits with `digits_mlp`, which can fit them all: its cross entropy tends to 0."""
    dataset = datasets.load("digits")
    nets = [
        models.build("digits_mlp", dataset.input_shape, dataset.num_classes, seed=seed)
        for seed in seeds
    ]
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(net.params for net in nets))
    data = jax.tree.map(jnp.asarray, dataset.train)
    return _problem("digits, a net that can fit them all", nets[0].loss, data, starts, 0.0)


def noisy_digits(seeds: Sequence[int]) -> Problem:
    """Digits of which 20 % have a wrong label, with a penalised softmax regression, from zero."""
    dataset = datasets.load("digits_noisy")
    features = np.prod(dataset.input_shape)
    start = {"w": jnp.zeros((features, dataset.num_classes)), "b": jnp.zeros(dataset.num_classes)}
    starts = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(seeds), *x.shape)), start)
    data = jax.tree.map(jnp.asarray, dataset.train)
    _, optimum = minimum(softmax_regression, start, data)
    title = "digits, 20 % of the labels wrong"
    return _problem(title, softmax_regression, data, starts, optimum)


def _problem(
    title: str, loss: Loss, data: dict[str, jax.Array], starts: PyTree, optimum: float
) -> Problem:
    losses = jax.jit(jax.vmap(lambda params: mean_loss(loss, params, data)))(starts)
    return Problem(title, loss, data, starts, optimum, np.asarray(losses) - optimum)


def softmax_regression(params: PyTree, example: Mapping[str, jax.Array]) -> jax.Array:
    """Cross entropy of a linear classifier of pixels in [0, 1], with its penalty."""
    pixels = example["input"].reshape(-1).astype(params["w"].dtype) / 16
    logits = pixels @ params["w"] + params["b"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])
    penalised: jax.Array = cross_entropy + PENALTY * jnp.sum(jnp.square(params["w"]))
    return penalised


def mean_loss(loss: Loss, params: PyTree, data: Mapping[str, jax.Array]) -> jax.Array:
    """The mean loss over all examples of `data`."""
    return jnp.mean(jax.vmap(loss, (None, 0))(params, data))


def minimum(loss: Loss, start: PyTree, data: Mapping[str, jax.Array]) -> tuple[PyTree, float]:
    """Where a convex mean loss is smallest and how small, by L-BFGS in float64.

    Raises:
      ArithmeticError: The search ended elsewhere.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), start)
        flat, unflatten = jax.flatten_util.ravel_pytree(wide)
        graded = jax.jit(jax.value_and_grad(lambda x: mean_loss(loss, unflatten(x), data)))
        found = scipy.optimize.minimize(
            graded,
            flat,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 10_000, "maxfun": 20_000, "gtol": 1e-7, "ftol": 0.0},
        )
        steepest = float(np.abs(found.jac).max())
        if not steepest < 1e-5:
            raise ArithmeticError(f"L-BFGS ended at a slope of {steepest}: {found.message}")
        return jax.tree.map(np.asarray, unflatten(jnp.asarray(found.x))), float(found.fun)
