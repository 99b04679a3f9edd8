"""Training loops to be timed: CABS, plain SGD, and the compiled step alone."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments import datasets
from experiments.training import models
from experiments.training.step import make_train_step, mean_loss

SIZES = cabs_jax.buckets(16, 2048)
LEARNING_RATE = 0.5


class Problem(NamedTuple):
    """A net and the examples that it is trained on, in host memory."""

    loss: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    data: PyTree


class TimedRun(NamedTuple):
    """A finished run: its batch sizes and losses, one a step, and its seconds."""

    sizes: list[int]
    losses: list[float]
    seconds: float


def digits(seed: int) -> Problem:
    """The small net of the comparison, with its initial parameters for a seed."""
    data = datasets.load("digits").train
    model = models.build("digits_mlp", data["input"].shape[1:], num_classes=10, seed=seed)
    return Problem(model.loss, model.params, data)


def tiny(tensors: int) -> Problem:
    """Linear regression on eight features, whose weights are a sum of so many tensors."""

    def loss(params: PyTree, example: PyTree) -> jax.Array:
        weights = sum(params[1:], start=params[0])
        return 0.5 * jnp.square(example["x"] @ weights - example["y"])

    random = np.random.default_rng(0)
    data = {
        "x": random.normal(size=(4096, 8)).astype(np.float32),
        "y": random.normal(size=4096).astype(np.float32),
    }
    return Problem(loss, [jnp.zeros(8) for _ in range(tensors)], data)


def optimizer_for(smallest: int, largest: int) -> optax.GradientTransformationExtraArgs:
    """CABS as the experiments run it, within bounds."""
    return optax.chain(
        cabs_jax.adapt_batch_size(
            cabs_jax.rules.cabs(LEARNING_RATE), min_batch_size=smallest, max_batch_size=largest
        ),
        optax.inject_hyperparams(optax.sgd)(learning_rate=LEARNING_RATE),
    )


def compiled_step(
    problem: Problem, sizes: Sequence[int] = (), *, smallest: int = 16, largest: int = 2048
) -> cabs_jax.CompiledStep:
    """The train step of the experiments."""
    return cabs_jax.CompiledStep(
        make_train_step(problem.loss, optimizer_for(smallest, largest)),
        sizes,
        batch_argnums=(2, 3),
        donate_argnums=(0, 1),
    )


def start_of(problem: Problem, smallest: int, largest: int) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state that may be donated."""
    state = optimizer_for(smallest, largest).init(problem.params)
    params, opt_state = jax.tree.map(jnp.copy, (problem.params, state))
    return params, opt_state


def cabs_loop(problem: Problem, smallest: int, largest: int, lag: int = 0) -> Iterator[Any]:
    """The steps of a CABS run; without lag the host knows the size at the end of each."""
    step = compiled_step(problem, smallest=smallest, largest=largest)
    params, state = start_of(problem, smallest, largest)
    loader = cabs_jax.BatchLoader(problem.data, smallest, lag=lag)
    while True:
        params, state, info = step(params, state, next(loader), None)
        loader.batch_size = info.next_batch_size
        if not lag:
            loader.batch_size = int(info.next_batch_size)
        yield info


def bare_call(problem: Problem) -> Iterator[Any]:
    """The compiled step alone, on one batch, whose result is waited for."""
    params, state = start_of(problem, 16, 16)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:16]), problem.data)
    step = jax.jit(make_train_step(problem.loss, optimizer_for(16, 16)), donate_argnums=(0, 1))
    call = step.lower(params, state, batch).compile()
    while True:
        params, state, info = call(params, state, batch)
        yield jax.block_until_ready(info)


def sgd_loop(problem: Problem, sizes: Iterator[int], pad: bool = False) -> Iterator[Any]:
    """Plain `optax.sgd`, whose host never waits for a size."""
    optimizer = optax.sgd(LEARNING_RATE)
    gradient = jax.value_and_grad(mean_loss(problem.loss))

    def step(params: PyTree, state: PyTree, batch: PyTree, mask: Any) -> tuple[Any, Any, Any]:
        loss, grads = gradient(params, batch, mask)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    run = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, problem.params)
    state = optimizer.init(params)
    loader = cabs_jax.BatchLoader(problem.data, pad_to=SIZES if pad else None)
    for size in sizes:
        loader.batch_size = size
        batch, mask = next(loader) if pad else (next(loader), None)
        params, state, loss = run(params, state, batch, mask)
        yield loss


def replay(problem: Problem, sizes: Sequence[int]) -> float:
    """Seconds that SGD takes for these sizes, padded as those of CABS, compilation apart."""
    pad = len(set(sizes)) > 1
    needed = dict.fromkeys(next(b for b in SIZES if b >= m) if pad else m for m in sizes)
    loop = sgd_loop(problem, itertools.chain(needed, sizes), pad)
    for _ in needed:
        jax.block_until_ready(next(loop))
    started = time.perf_counter()
    for loss in loop:
        last = loss
    jax.block_until_ready(last)
    return time.perf_counter() - started


def train(
    problem: Problem, step: cabs_jax.CompiledStep, steps: int, late: int = 0, seed: int = 0
) -> TimedRun:
    """A CABS run with padded batches; its numbers are read when it is over."""
    params, state = start_of(problem, 16, 2048)
    loader = cabs_jax.BatchLoader(problem.data, 16, seed, pad_to=SIZES, lag=late)
    sizes, infos = [], []
    started = time.perf_counter()
    for _ in range(steps):
        batch, mask = next(loader)
        params, state, info = step(params, state, batch, mask)
        loader.batch_size = info.next_batch_size
        sizes.append(int(mask.sum()))
        infos.append(info.loss)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    return TimedRun(sizes, [float(loss) for loss in jax.device_get(infos)], seconds)
