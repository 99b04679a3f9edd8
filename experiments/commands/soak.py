"""Kills, faults and restarts what may not lose anything, for a while."""

from rich.console import Console

from experiments.errors import user_errors
from experiments.soak.soak import SoakError, soak


def main(*, minutes: float = 1.0, seed: int = 0) -> None:
    """Soaks, and prints what happened.

    Args:
      minutes: How long.
      seed: Of everything random.
    """
    with user_errors(SoakError):
        soak(minutes, seed, Console())
