"""Trains once."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from cyclopts import Parameter
from jax.experimental import multihost_utils
from rich.console import Console

from experiments import datasets, environment
from experiments.commands import Flag
from experiments.commands import _display as display
from experiments.errors import UserError, user_errors
from experiments.escape import for_terminal, printable
from experiments.training import checkpoint, figure, methods, models, processes, run_folder
from experiments.training.checkpoint import Checkpoints, Schedule
from experiments.training.config import RunConfig
from experiments.training.train import Experiment, set_up, train

RUNS = Path("runs")
KNOWN = {"dataset": datasets.NAMES, "method": methods.METHODS, "model": models.NAMES}


def _option(field: dataclasses.Field[Any]) -> tuple[str, Any, Any]:
    """A field of `RunConfig` as an option that is None where the command line lacks it."""
    text = field.metadata["help"]
    if field.name in KNOWN:
        text += f": {', '.join(KNOWN[field.name])}"
    if field.default not in (None, ""):
        text += f" [default: {field.default}]"
    option = dataclasses.field(default=None, metadata={"help": text})
    return field.name, field.type | None, option  # type: ignore[operator]


Options = dataclasses.make_dataclass(
    "Options", map(_option, dataclasses.fields(RunConfig)), frozen=True
)
Options.__module__ = __name__


def main(
    *,
    options: Annotated[Options, Parameter(name="*")] = Options(),  # type: ignore[valid-type]  # noqa: B008
    data_dir: str | None = None,
    out: Path | None = None,
    resume: Flag = False,
    checkpoint_every_steps: int | None = None,
    checkpoint_every_minutes: float = Schedule().every_minutes,
    keep_checkpoints: int = Schedule().keep,
    distributed: Flag = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Trains once.

    Args:
      options: What the run's numbers depend on.
      data_dir: the folder of the data sets (default $CABS_JAX_DATA)
      out: a new or empty folder for the results (default: a new one under ./runs)
      resume: continue the run in --out from its newest whole checkpoint, or from the first step;
        options that are left out are those of that run. With --distributed, repeat them all: the
        first process writes checkpoints on time and at the end, but hardly ever on a signal, and
        any number of processes may resume
      checkpoint_every_steps: also write a checkpoint so often
      checkpoint_every_minutes: write a checkpoint so often, and at the end, on Ctrl-C and on
        SIGTERM
      keep_checkpoints: how many, the newest, to keep
      distributed: one of several processes, over whose devices batches are split; process 0
        writes, and if one fails or dies all end and say why (if process 0 is killed, by JAX's
        abort, status 134: "another task died"). Cloud TPU and SLURM say which it is; elsewhere the
        next three options do
      coordinator: HOST:PORT, where process 0 listens
      num_processes: how many there are
      process_id: this one, from 0
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    schedule = Schedule(checkpoint_every_steps, checkpoint_every_minutes, keep_checkpoints)
    with mesh_of_processes(distributed, coordinator, num_processes, process_id) as mesh:
        run(given, data_dir, out, resume, schedule, mesh)


def run(
    options: Mapping[str, Any],
    data_dir: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    schedule: Schedule = Schedule(),  # noqa: B008
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Trains once, or goes on with it; of several processes the first shows it.

    Args:
      options: Fields of `RunConfig`; those left out are the defaults or, when resuming in one
        process, those of the run in `out`.
      data_dir: The folder of the data sets.
      out: The folder of the run; None makes a new one under `RUNS`.
      resume: Whether to continue the run in `out`.
      schedule: When to write checkpoints.
      mesh: All devices of all processes, where there are several.

    Raises:
      UserError: The user can put it right.
      Interrupted: A signal came; a checkpoint was written.
    """
    writes = jax.process_index() == 0
    with user_errors(ValueError, OSError):
        schedule.checked()
        if resume and out is None:
            raise UserError("--resume needs --out, the folder of the run to continue.")
        if resume and out is not None and mesh is None:
            options = stored_options(out, options)
        config = RunConfig(**options)
        if mesh is not None:
            processes.agree("options", {**dataclasses.asdict(config), "resume": resume})
            processes.agree("code", environment.code())
        checkpoint.check_path(RUNS if out is None else out)
        if out is not None and writes and not resume:
            run_folder.check_unused(out)
        finished = resume and out is not None and is_finished(out, mesh)
        if finished and (not writes or (out / run_folder.FIGURE).exists()):  # type: ignore[operator]
            print(f"{printable(out)} holds a finished run; there is nothing to resume")
            return
        experiment = set_up(config, data_dir)
        if mesh is not None:
            processes.agree("data", {"fingerprint": datasets.fingerprint(experiment.dataset)})
        if out is None and writes:
            name = re.sub(r"[^\w.-]+", "_", experiment.dataset.name)[:50]
            out = run_folder.fresh_folder(RUNS, f"{name}-{config.method}")
    if out is None or not writes:
        train(experiment, None, mesh=mesh, checkpoints=Checkpoints(None), resume=resume)
        return
    label = f"{config.method} {config.batch_size}" if config.fixed_size else config.method
    figure_path = out / run_folder.FIGURE
    if finished:
        with user_errors(ValueError, OSError):
            draw({label: out}, figure_path, title_of(experiment))
        told = f"{out} holds a finished run, whose figure was missing: {figure_path}"
        print(printable(told))
        return
    with user_errors(OSError), Checkpoints(out / checkpoint.FOLDER, schedule) as checkpoints:
        train_and_plot({label: experiment}, {label: out}, figure_path, mesh, checkpoints, resume)


def stored_options(out: Path, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the run in `out`, which those given must agree with.

    Raises:
      ResumeError: They do not, or the run's file is not one of ours.
    """
    stored = run_folder.read_config(out)
    if stored is None:
        return given
    run_folder.check_equal(f"the run in {out}", {key: stored.get(key) for key in given}, given)
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    for key, value in stored.items():
        if key not in fields:
            raise run_folder.ResumeError(f"{out / run_folder.CONFIG} holds an unknown key: {key}.")
        kind: Any = fields[key].type
        if not isinstance(value, kind) and not (isinstance(value, int) and isinstance(0.5, kind)):
            raise run_folder.ResumeError(f"{out / run_folder.CONFIG} holds {value!r} as {key}.")
    return stored


def is_finished(out: Path, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether the first process finds a summary in `out`, as all processes are told."""
    finished = np.int32(jax.process_index() == 0 and run_folder.read_summary(out) is not None)
    return bool(finished if mesh is None else multihost_utils.broadcast_one_to_all(finished))


@contextlib.contextmanager
def mesh_of_processes(
    distributed: bool,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[jax.sharding.Mesh | None]:
    """Joins the other processes, if this is one of several; what is None is found out.

    Returns:
      One axis over all devices of all processes, or None, as a context.
    """
    where = {
        "coordinator": coordinator,
        "num-processes": num_processes,
        "process-id": process_id,
    }
    if not distributed:
        for name, value in where.items():
            if value is not None:
                raise UserError(f"--{name} goes with --distributed.")
        yield None
        return
    with contextlib.ExitStack() as stack:
        with user_errors(ValueError, RuntimeError):
            mesh = stack.enter_context(processes.joined(coordinator, num_processes, process_id))
        yield mesh


def train_and_plot(
    experiments: Mapping[str, Experiment],
    folders: Mapping[str, Path],
    figure_path: Path,
    mesh: jax.sharding.Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
) -> None:
    """Trains each experiment into its folder, draws them in one figure and prints a table."""
    console = Console()
    title = title_of(next(iter(experiments.values())))
    summaries = {}
    with (
        user_errors(OSError, run_folder.ResumeError),
        display.progress_bars(console) as bars,
        display.refreshed(partial(draw, folders, figure_path, title), console),
    ):
        for label, experiment in experiments.items():
            observe = display.observer(bars, label, experiment.config)
            summaries[label] = train(experiment, folders[label], observe, mesh, checkpoints, resume)
    with user_errors(ValueError, OSError):
        draw(folders, figure_path, title)
    console.print(display.summary_table(summaries))
    console.print(for_terminal(f"figure: {figure_path}"), soft_wrap=True)


def draw(folders: Mapping[str, Path], figure_path: Path, title: str) -> None:
    """Draws the runs that have begun, by their labels, if there are any."""
    begun = {label: out for label, out in folders.items() if (out / run_folder.METRICS).exists()}
    records = {label: run_folder.read(out) for label, out in begun.items()}
    shown = {k: record for k, record in records.items() if record.metrics and record.evaluations}
    if shown:
        figure.plot(shown, figure_path, title)


def title_of(experiment: Experiment) -> str:
    """What a figure of runs is headed."""
    config, dataset, _, _ = experiment
    return f"{dataset.name}, {config.model}, learning rate {config.learning_rate:g}"
