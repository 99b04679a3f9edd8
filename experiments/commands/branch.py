"""Continues one checkpoint with several constant batch sizes: which of them keep the loss?

All branches see the same examples in the same order, so a larger batch makes fewer steps of them,
at a larger learning rate. The noise scale ξ/‖∇F‖² at the checkpoint, which foretells the answer
(McCandlish et al. 2018, "An Empirical Model of Large-Batch Training"), is shown beside it. Writes a
run's folder for every branch, branches.jsonl, one line a size, and branches.png.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments.commands import _display as display
from experiments.commands.run import stored_options
from experiments.errors import UserError, user_errors
from experiments.escape import for_terminal
from experiments.training import methods, run_folder
from experiments.training.checkpoint import FOLDER, Checkpoints
from experiments.training.config import RunConfig
from experiments.training.figure import blank, doubling, finish
from experiments.training.shared_programs import SharedPrograms
from experiments.training.train import TRAIN_EXAMPLES_EVALUATED, Experiment, set_up, subset, train

MEASURED_EXAMPLES, CHUNK = 2_000, 500  # behind the noise scale


class Origin(NamedTuple):
    """Where the branches begin."""

    experiment: Experiment
    step: int
    params: PyTree
    state: optax.OptState


class Branch(NamedTuple):
    """One size.

    Attributes:
      losses: (seeds, evaluations), the training losses along the branch.
    """

    factor: float
    batch_size: int
    learning_rate: float
    examples: np.ndarray
    losses: np.ndarray


def main(
    run: Path,
    /,
    *,
    out: Path,
    step: int | None = None,
    factors: tuple[float, ...] = (1, 2, 4, 8),
    examples: int = 20_000,
    power: float | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    tolerance: float = 0.01,
    data_dir: str | None = None,
) -> None:
    """Continues a run from a checkpoint with several batch sizes.

    Args:
      run: the folder of a run that wrote checkpoints
      out: a new or empty folder for the branches
      step: branch off the newest checkpoint up to this step (default: the newest)
      factors: multiples of the batch size at the checkpoint; the first is compared with
      examples: the window, how many examples each branch sees
      power: of the factor, by which the learning rate grows (default: 0.5 with Adam, else 1)
      seeds: of the order of the examples, a branch of every size for each
      tolerance: how much larger, relatively, a loss that is kept may be
      data_dir: the folder of the data sets (default $CABS_JAX_DATA)
    """
    console = Console()
    with user_errors(ValueError, OSError):
        _check(factors, seeds, tolerance)
        run_folder.check_unused(out)
        origin = read(run, step, data_dir)
        if power is None:
            power = 0.5 if constant_method(origin.experiment.config).endswith("adam") else 1.0
        with display.progress_bars(console) as bars:
            shared = SharedPrograms(origin.experiment.model)
            branches = [
                follow(origin, factor, power, examples, seeds, out, bars, shared)
                for factor in factors
            ]
        scale = noise_scale(origin)
        lines = [_line(branch, branches[0], tolerance) for branch in branches]
        with run_folder.replacing(out / "branches.jsonl") as partial:
            partial.write_text("".join(map(run_folder.to_json, lines)), encoding="utf-8")
        _plot(origin, branches, scale, tolerance, out / "branches.png")
    console.print(_table(lines))
    kept = max(line["batch_size"] for line in lines if line["kept"])
    console.print(
        f"From step {origin.step:,}: sizes up to {kept} keep the loss within {tolerance:.2%}; the "
        f"noise scale there is {scale:,.0f}."
    )
    console.print(for_terminal(f"figure: {out / 'branches.png'}"), soft_wrap=True)


def _check(factors: Sequence[float], seeds: Sequence[int], tolerance: float) -> None:
    if not factors or min(factors) <= 0 or len(set(factors)) < len(factors):
        raise ValueError(f"factors must be positive and differ, got {factors}.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, and there must be one, got {seeds}.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}.")


def read(run: Path, step: int | None = None, data_dir: str | None = None) -> Origin:
    """The newest whole checkpoint of a run, up to `step`.

    Raises:
      UserError: There is none.
      ValueError, OSError: The run or its data cannot be read.
    """
    if run_folder.read_config(run) is None:
        raise UserError(f"{run} is not the folder of a run.")
    experiment = set_up(RunConfig(**stored_options(run, {})), data_dir)
    params = experiment.model.params
    with Checkpoints(run / FOLDER) as checkpoints:
        found = checkpoints.restore((params, experiment.optimizer.init(params)), step)
    if found is None:
        up_to = "" if step is None else f" up to step {step}"
        raise UserError(f"{run} holds no checkpoint{up_to}: `run` writes them as it goes on.")
    (params, state), progress = jax.tree.map(jnp.array, found[0]), found[1]
    return Origin(experiment, progress["step"], params, state)


def constant_method(config: RunConfig) -> str:
    """The method of constant size whose steps are those of the run's method."""
    for direction in ("momentum", "adam"):
        if config.method.endswith(direction):
            return f"constant_{direction}"
    return "constant"


def follow(
    origin: Origin,
    factor: float,
    power: float,
    examples: int,
    seeds: Sequence[int],
    out: Path,
    bars: Any,
    shared: SharedPrograms,
) -> Branch:
    """Trains one size over the window, once for every seed, below `out`."""
    records = []
    for seed in seeds:
        branch = continued(origin, factor, power, examples, seed)
        folder = out / f"size-{branch.config.batch_size}-seed-{seed}"
        observe = display.observer(bars, folder.name, branch.config)
        train(branch, folder, observe, shared=shared)
        records.append(run_folder.read(folder).evaluations)
    losses = np.stack([record["train_loss"] for record in records])
    config = branch.config
    return Branch(factor, config.batch_size, config.learning_rate, records[0]["examples"], losses)


def continued(origin: Origin, factor: float, power: float, examples: int, seed: int) -> Experiment:
    """The run from its checkpoint on, at `factor` times its size and factor^power times its α.

    Momentum and Adam's averages go on; nothing else of the optimizer's state has a part in steps
    of a constant size.
    """
    experiment, _, params, state = origin
    config = dataclasses.replace(
        experiment.config,
        method=constant_method(experiment.config),
        schedule="constant",
        batch_size=max(1, round(factor * int(cabs_jax.batch_size(state)))),
        learning_rate=methods.next_learning_rate(experiment.config, state) * factor**power,
        steps=None,
        examples=examples,
        evaluation_examples=experiment.config.evaluation_examples or TRAIN_EXAMPLES_EVALUATED,
        test_evaluations=None,
        averages=False,
        record_variance=False,
        stop_without_progress=False,
        seed=seed,
    )
    optimizer = methods.build(config)
    fresh = optimizer.init(params)
    remembered = [node for node in jax.tree.leaves(state, is_leaf=_remembers) if _remembers(node)]
    direction = jax.tree.map(
        lambda node: remembered[0] if _remembers(node) else node,
        fresh.direction,
        is_leaf=_remembers,
    )
    start = fresh._replace(direction=direction)
    return Experiment(
        config,
        experiment.dataset,
        experiment.model._replace(params=params),
        optimizer._replace(init=lambda _: start),
    )


def _remembers(node: Any) -> bool:
    return isinstance(node, optax.TraceState | optax.ScaleByAdamState)


def noise_scale(origin: Origin) -> float:
    """ξ/‖∇F‖² at the checkpoint, both unbiased, from MEASURED_EXAMPLES of the training examples."""
    data = subset(origin.experiment.dataset.train, MEASURED_EXAMPLES)
    moments_of = jax.jit(cabs_jax.gradient_moments(origin.experiment.model.loss))
    moments = functools.reduce(
        cabs_jax.merge_moments,
        (
            moments_of(origin.params, {k: x[start : start + CHUNK] for k, x in data.items()})
            for start in range(0, len(data["label"]), CHUNK)
        ),
    )
    meter = cabs_jax.monitor()
    state = meter.init(origin.params)
    _, state = meter.update(moments.mean, state, origin.params, moments=moments)
    return float(cabs_jax.info(state).noise_scale)


def _line(branch: Branch, first: Branch, tolerance: float) -> dict[str, Any]:
    """What is told of a size: its last loss, the mean over seeds, beside that of the first size."""
    last = branch.losses[:, -1]
    ratios = last / first.losses[:, -1]
    return {
        "factor": branch.factor,
        "batch_size": branch.batch_size,
        "learning_rate": branch.learning_rate,
        "train_loss": float(last.mean()),
        "relative_loss": float(ratios.mean()),
        "standard_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5) if last[1:].size else None,
        "kept": bool(ratios.mean() <= 1 + tolerance),
    }


def _table(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("batch size", "learning rate", "train loss", "relative", "kept"):
        table.add_column(heading, justify="right")
    for line in lines:
        error = "" if line["standard_error"] is None else f" ± {line['standard_error']:.4f}"
        table.add_row(
            str(line["batch_size"]),
            f"{line['learning_rate']:.4g}",
            f"{line['train_loss']:.4f}",
            f"{line['relative_loss']:.4f}{error}",
            "yes" if line["kept"] else "no",
        )
    return table


def _plot(
    origin: Origin, branches: Sequence[Branch], scale: float, tolerance: float, path: Path
) -> None:
    """The losses along the window, and the last of them against the batch size."""
    figure = blank(9, 3.8)
    along, last = figure.subplots(1, 2)
    for branch in branches:
        label = f"{branch.batch_size} at {branch.learning_rate:.3g}"
        along.plot(branch.examples, branch.losses.mean(0), label=label)
    along.legend(frameon=False, title="batch size, learning rate")
    along.set(xlabel="examples seen since the checkpoint", ylabel="training loss")
    along.xaxis.set_major_formatter(EngFormatter(sep=""))
    sizes = [branch.batch_size for branch in branches]
    losses = np.stack([branch.losses[:, -1] for branch in branches])  # (sizes, seeds)
    last.plot(sizes, losses, ".", color="C0", alpha=0.5)
    last.plot(sizes, losses.mean(1), color="C0")
    last.axhline(losses[0].mean() * (1 + tolerance), color="0.5", ls=":", label="kept below")
    if np.isfinite(scale):
        last.axvline(scale, color="C1", ls="--", label="noise scale")
    doubling(last, "x")
    last.legend(frameon=False)
    last.set(xlabel="batch size", ylabel="training loss at the end")
    finish(figure, f"{origin.experiment.dataset.name} from step {origin.step:,}")
    with run_folder.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
