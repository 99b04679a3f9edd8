"""What the study's plan, experiments/results/PLAN.md, asks of each data set, as numbers."""

from typing import NamedTuple

POINTS_EVERY = 2_000  # examples between evaluations
LATE_ACCURACIES = 3  # evaluations whose test accuracies are averaged
MOST_EXTENSIONS = 2  # of a grid of learning rates, by a factor of two each


class Asked(NamedTuple):
    """The part of the plan about one data set.

    Attributes:
      part: Its letter.
      targets: Training losses that the methods race to.
      good: The training loss up to which a learning rate counts as good.
      grid_runs: How many runs the grid has.
      seeds: The fresh ones, of the finals.
      examples: Of a run of the finals.
      halved: Whether constant sizes run at half their learning rate, too, and of them only the best
        and the largest.
      schedules: Whether decreasing learning rates run.
    """

    part: str
    targets: tuple[float, ...]
    good: float
    grid_runs: int
    seeds: tuple[int, ...]
    examples: int
    halved: bool = True
    schedules: bool = False


FRESH = (3, 4, 5, 6, 7)
BY_DATA_SET = {
    "cifar10": Asked("A", (1.2, 1.0, 0.8), 1.0, 108, FRESH, 200_000, schedules=True),
    "mnist": Asked("B", (0.1, 0.05, 0.02), 0.05, 108, FRESH, 100_000),
    "tinyimagenet32": Asked("C", (4.0, 3.6), 4.0, 16, FRESH[:3], 100_000, halved=False),
}
