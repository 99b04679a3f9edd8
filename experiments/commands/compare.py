"""Trains the digits with CABS and with constant batch sizes 16 and 128, and draws them.

The data are scikit-learn's, the net is small. The metrics and a figure go under ./runs.
"""

import dataclasses
from pathlib import Path

from experiments.commands.run import RUNS, train_and_plot
from experiments.errors import user_errors
from experiments.training import run_folder
from experiments.training.config import RunConfig
from experiments.training.train import set_up

EXAMPLES = 60_000


def main() -> None:
    """Trains the three and prints a table."""
    cabs = RunConfig(learning_rate=0.5, examples=EXAMPLES, evaluations=60)
    configs = {
        "CABS": cabs,
        "constant 16": dataclasses.replace(cabs, method="constant", batch_size=16),
        "constant 128": dataclasses.replace(cabs, method="constant", batch_size=128),
    }
    with user_errors(ValueError, OSError):
        experiments = {label: set_up(config) for label, config in configs.items()}
        out = run_folder.fresh_folder(RUNS, "digits-comparison")
    folders: dict[str, Path] = {label: out / label.lower().replace(" ", "-") for label in configs}
    train_and_plot(experiments, folders, out / run_folder.FIGURE)
