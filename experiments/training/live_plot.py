"""One figure of a run that a notebook updates while it goes on."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import cabs_jax
from experiments.training.figure import COLOURS, blank, doubling, finish


def live_plot(
    show: Callable[[Figure], object], every: int = 20
) -> Callable[[cabs_jax.Info, int], None]:
    """Returns a function to be called after every step, which redraws loss, noise scale and size.

    Args:
      show: What is given the figure: in a notebook `display(None, display_id=True).update` of
        IPython, which replaces the one that it showed before.
      every: Number of steps from one redrawing to the next.

    Returns:
      A function `(info, batch_size)` of `cabs_jax.info(state)` and the size of the step. It reads
      them from the device only when it redraws.
    """
    records: list[tuple[cabs_jax.Info, int]] = []
    figure = blank(9, 3.2)

    def record(info: cabs_jax.Info, batch_size: int) -> None:
        records.append((info, batch_size))
        if len(records) % every == 0:
            figure.clear()
            _draw(figure, records)
            show(figure)

    return record


def _draw(figure: Figure, records: list[tuple[cabs_jax.Info, int]]) -> None:
    infos, sizes = zip(*records, strict=True)
    seen = np.cumsum(sizes)
    losses, noise = figure.subplots(1, 2)
    losses.plot(seen, _numbers(infos, "value"), color=COLOURS[0])
    losses.set_ylabel("loss of the batch")
    doubling(noise, "y")
    noise.step(seen, sizes, where="pre", color=COLOURS[0], label="batch size")
    scale, low, high = (_numbers(infos, f"noise_scale{end}") for end in ("", "_low", "_high"))
    noise.plot(seen, scale, color=COLOURS[1], label="noise scale")
    noise.fill_between(seen, low, high, color=COLOURS[1], alpha=0.2, linewidth=0)
    noise.legend(frameon=False)
    for axes in (losses, noise):
        axes.set_xlabel("examples seen")
    finish(figure, "")


def _numbers(infos: Any, name: str) -> np.ndarray:
    """One measurement of every step, with gaps where it is infinite."""
    numbers = np.asarray([float(getattr(info, name)) for info in infos])
    return np.where(np.isfinite(numbers), numbers, np.nan)
