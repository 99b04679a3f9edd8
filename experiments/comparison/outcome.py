"""What all runs on a problem came to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.comparison.runs import METHODS, Grid, Stretch

# Methods that are also shown at the averages of their weights, which cost no examples.
AVERAGED = ("constant 16", "CABS, estimated")


class Outcome(NamedTuple):
    """The runs of a grid on one problem.

    Attributes:
      title: Of the problem.
      grid: Methods, learning rates and seeds.
      ends: Numbers of examples seen, at which losses were taken, (ends,).
      untrained: Loss above the optimum before the first step, (seeds,).
      loss: Loss above the optimum over all training examples, (*grid.shape, ends).
      averaged_loss: That of the averaged weights.
      batch_sizes: Of all steps, (*grid.shape, steps), with zeros after the steps of each stretch.
    """

    title: str
    grid: Grid
    ends: Sequence[int]
    untrained: np.ndarray
    loss: np.ndarray
    averaged_loss: np.ndarray
    batch_sizes: np.ndarray

    def curve(self, method: str, averaged: bool) -> np.ndarray:
        """Losses of a method, (learning rates, seeds, ends)."""
        losses = self.averaged_loss if averaged else self.loss
        of_method: np.ndarray = losses[self.grid.methods.index(method)]
        return of_method

    def sizes(self, method: str, rate: float, seed: int) -> np.ndarray:
        """Batch sizes of a run, one for each of its steps."""
        index = (
            self.grid.methods.index(method),
            self.grid.learning_rates.index(rate),
            self.grid.seeds.index(seed),
        )
        sizes: np.ndarray = self.batch_sizes[index]
        return sizes[sizes > 0]

    def shown(self) -> list[tuple[str, bool]]:
        """Methods, and whether at averaged weights, in the order in which they are shown."""
        methods = self.grid.methods
        return [(name, False) for name in methods] + [
            (name, True) for name in AVERAGED if name in methods
        ]


class Summary(NamedTuple):
    """What a method came to at the end of its runs.

    Attributes:
      best: The lowest loss above the optimum over learning rates, geometric mean over seeds.
      best_rate: Where that was.
      excess: Geometric mean over learning rates and seeds of the loss, relative to the best of
        all methods; a loss above that of the untrained net counts as that.
    """

    best: float
    best_rate: float
    excess: float


def collect(
    title: str,
    grid: Grid,
    ends: Sequence[int],
    untrained: np.ndarray,
    stretches: Iterable[Stretch],
) -> Outcome:
    """Puts the stretches of all runs together."""
    losses, averaged, sizes = zip(*stretches, strict=True)
    return Outcome(
        title,
        grid,
        ends,
        untrained,
        np.stack(losses, axis=-1),
        np.stack(averaged, axis=-1),
        np.concatenate(sizes, axis=-1),
    )


def summaries(outcome: Outcome) -> dict[tuple[str, bool], Summary]:
    """One summary for each method shown."""
    finals = {
        key: np.minimum(np.nan_to_num(outcome.curve(*key)[..., -1], nan=np.inf), outcome.untrained)
        for key in outcome.shown()
    }
    logs = {key: np.log(np.maximum(final, 1e-12)) for key, final in finals.items()}
    lowest = min(log.mean(axis=1).min() for log in logs.values())
    return {
        key: Summary(
            best=float(np.exp(log.mean(axis=1).min())),
            best_rate=rate_of(key[0], outcome.grid.learning_rates[int(log.mean(axis=1).argmin())]),
            excess=float(np.exp(log.mean() - lowest)),
        )
        for key, log in logs.items()
    }


def rate_of(method: str, rate: float) -> float:
    """The learning rate of a method's run, for one of the grid."""
    return float(f"{rate * METHODS[method].factor:.6g}")


def records(outcome: Outcome) -> Iterable[Mapping[str, Any]]:
    """One record for each run."""
    for m, method in enumerate(outcome.grid.methods):
        for a, rate in enumerate(outcome.grid.learning_rates):
            for s, seed in enumerate(outcome.grid.seeds):
                sizes = outcome.sizes(method, rate, seed)
                yield {
                    "problem": outcome.title,
                    "method": method,
                    "learning_rate": rate_of(method, rate),
                    "seed": seed,
                    "steps": len(sizes),
                    "examples": int(sizes.sum()),
                    "last_batch_size": int(sizes[-1]),
                    "loss_above_optimum": _short(outcome.loss[m, a, s]),
                    "averaged_loss_above_optimum": _short(outcome.averaged_loss[m, a, s]),
                }


def _short(values: np.ndarray) -> list[float | None]:
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in values]
