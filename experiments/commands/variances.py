"""Measures the gradient variance along one run of CABS, exactly and as the authors' code has it.

Theirs squares a convolution's products before it sums them over positions. The run follows the
exact one. Writes variances.jsonl, one line a step, and variances.png.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.ticker import EngFormatter
from rich.progress import track

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments import datasets
from experiments.errors import user_errors
from experiments.escape import printable
from experiments.training import methods, models, run_folder
from experiments.training.config import BUCKETS, RunConfig
from experiments.training.figure import blank, doubling, finish, logarithmic
from experiments.training.positions import squares_over_positions
from experiments.training.step import make_update


def main(
    *,
    out: Path,
    dataset: str = "cifar10",
    learning_rate: float = 0.1,
    steps: int = 3000,
    width: float = 1.0,
    seed: int = 0,
    data_dir: str | None = None,
) -> None:
    """Trains, and writes both variances of every step.

    Args:
      out: a new or empty folder for the numbers and the figure
      dataset: as for `run`, with the net that fits it
      learning_rate: of CABS
      steps: how many
      width: multiplies the channels and units of the net
      seed: of the initial parameters and of the order of the examples
      data_dir: the folder of the data sets (default $CABS_JAX_DATA)
    """
    with user_errors(ValueError, OSError):
        config = RunConfig(
            dataset=dataset,
            learning_rate=learning_rate,
            steps=steps,
            width=width,
            seed=seed,
            round_to=BUCKETS,
        )
        data = datasets.load(dataset, data_dir=data_dir)
        run_folder.check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
        measured = list(track(_both(config, data), "steps", steps))
        with run_folder.replacing(out / "variances.jsonl") as partial:
            partial.write_text("".join(map(run_folder.to_json, measured)), encoding="utf-8")
        _plot({key: np.array([line[key] for line in measured]) for key in measured[0]}, out)
    print(printable(out / "variances.png"))


def _both(config: RunConfig, data: datasets.Dataset) -> Iterator[dict[str, float]]:
    """Batch size, loss and both variances of each step."""
    net = config.model, data.input_shape, data.num_classes, config.width
    model, optimizer = models.build(*net, seed=config.seed), methods.build(config)
    moments_of, update = cabs_jax.gradient_moments(model.loss), make_update(optimizer)
    squares_of = squares_over_positions(*net)

    @jax.jit
    def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, Any, jax.Array]:
        moments = moments_of(params, batch)
        authors = squares_of(params, batch) - optax.tree.norm(moments.mean, squared=True)
        params, state, info = update(params, state, moments)
        return params, state, info, authors

    params, state = model.params, optimizer.init(model.params)
    with cabs_jax.BatchLoader(data.train, int(cabs_jax.batch_size(state)), config.seed) as loader:
        examples = 0
        for number in range(1, config.limit[1] + 1):
            batch = next(loader)
            params, state, info, authors = step(params, state, batch)
            loader.batch_size = info.next_batch_size
            examples += len(batch["label"])
            yield {
                "step": number,
                "batch_size": len(batch["label"]),
                "examples": examples,
                "loss": float(info.loss),
                "exact": float(info.gradient_variance),
                "over_positions": float(authors),
            }


def _plot(measured: dict[str, np.ndarray], out: Path, decay: float = 0.95) -> None:
    """Both variances, averaged as CABS averages them, their ratio, and the size that follows."""

    def averaged(values: np.ndarray) -> np.ndarray:
        means = np.copy(values)
        for i in range(1, len(values)):
            means[i] = decay * means[i - 1] + (1 - decay) * values[i]
        return means

    seen, exact = measured["examples"], averaged(measured["exact"])
    authors = averaged(measured["over_positions"])
    figure = blank(12, 3.8)
    variances, ratio, size = figure.subplots(1, 3)
    variances.plot(seen, exact, label="exact")
    variances.plot(seen, authors, "--", label="the authors' sum over positions")
    variances.legend(frameon=False)
    logarithmic(variances, "y")
    variances.set_ylabel("gradient variance ξ")
    ratio.plot(seen, authors / exact)
    ratio.set_ylabel("the authors' ξ over the exact one")
    size.step(seen, measured["batch_size"], where="pre")
    doubling(size, "y")
    size.set_ylabel("batch size")
    for axes in (variances, ratio, size):
        axes.set_xlabel("examples seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    finish(figure, "Gradient variance along one run of CABS")
    with run_folder.replacing(out / "variances.png") as partial:
        figure.savefig(partial, dpi=120, format="png")
