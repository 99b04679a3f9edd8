"""The command line: the comparison without arguments, one run, many, a report, or a benchmark."""

import argparse
import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from experiments import benchmarks, datasets
from experiments.commands import display
from experiments.commands import sweep as study
from experiments.commands.errors import UserError, user_errors
from experiments.training import checkpoint, figure, methods, models, run_folder
from experiments.training.checkpoint import Checkpoints, Interrupted, Schedule
from experiments.training.config import BUCKETS, RunConfig
from experiments.training.train import Experiment, set_up, train

RUNS = Path("runs")
COMPARISON_EXAMPLES = 60_000

DESCRIPTION = """\
Without arguments: train a small net on scikit-learn's digits with CABS and with constant batch
sizes 16 and 128, write the metrics and a figure under ./runs, and print a table."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage, and exits with status 2."""
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 where the user can put it right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments:
            compare()
        elif arguments[0] == "bench" and arguments[1:2] not in ([], ["-h"], ["--help"]):
            bench(*arguments[1:])
        else:
            options = vars(parser().parse_args(arguments))
            command: Callable[[dict[str, Any]], int | None] = options.pop("command")
            return command(options) or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was written stays", file=sys.stderr)
        return 130
    except Interrupted as error:
        print(f"interrupted by {error}", file=sys.stderr)
        return 128 + error.signal
    return 0


def parser() -> Parser:
    """The parser of the command line; `run` takes the fields of `RunConfig` as options."""
    top = Parser(prog="python -m experiments", description=DESCRIPTION, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="run|sweep|report|soak|bench")
    run_parser = commands.add_parser(
        "run", help="train once", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    run_parser.set_defaults(command=run)
    study.add_parsers(commands)
    types: dict[Any, Callable[[str], Any]] = {
        int | None: int,
        float | None: float,
        int | str: _integer_or_buckets,
    }
    metavars: dict[Any, str] = {str: "NAME", float: "X", float | None: "X"}
    known = {"dataset": datasets.NAMES, "method": methods.METHODS, "model": models.NAMES}
    for field in dataclasses.fields(RunConfig):
        help_text = field.metadata["help"]
        if field.name in known:
            help_text += f": {', '.join(known[field.name])}"
        if field.default not in (None, ""):
            help_text += f" (default {field.default})"
        run_parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=types.get(field.type, field.type),
            metavar=metavars.get(field.type, "N"),
            help=help_text.replace("%", "%%"),
        )
    run_parser.add_argument(
        "--data-dir", metavar="DIR", help="holds the data sets (default $CABS_JAX_DATA)"
    )
    run_parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a new or empty folder for the results (default: a new one under ./runs)",
    )
    run_parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its newest whole checkpoint, or from the first step; "
        "options that are left out are those of that run. With --distributed, repeat them all: "
        "the first process writes checkpoints on time and at the end, but hardly ever on a signal, "
        "and any number of processes may resume",
    )
    default = Schedule()
    run_parser.add_argument(
        "--checkpoint-every-steps", type=int, metavar="N", help="also write a checkpoint so often"
    )
    run_parser.add_argument(
        "--checkpoint-every-minutes",
        type=float,
        metavar="X",
        help=f"write a checkpoint so often (default {default.every_minutes:g}), and at the end, on "
        "Ctrl-C and on SIGTERM",
    )
    run_parser.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help=f"how many, the newest, to keep (default {default.keep})",
    )
    run_parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, over whose devices batches are split; process 0 writes. "
        "Cloud TPU and SLURM say which it is; elsewhere the next three options do",
    )
    run_parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    run_parser.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    run_parser.add_argument("--process-id", type=int, metavar="N", help="this one, from 0")
    soak_parser = commands.add_parser(
        "soak",
        help="kill, fault and restart what may not lose anything, for a while",
        allow_abbrev=False,
    )
    soak_parser.set_defaults(command=soak)
    soak_parser.add_argument(
        "--minutes", type=float, default=1.0, metavar="X", help="how long (default 1)"
    )
    soak_parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of everything random (default 0)"
    )
    bench_parser = commands.add_parser("bench", help="measure", allow_abbrev=False)
    bench_parser.add_argument("name", choices=benchmark_names(), help="followed by its options")
    return top


def compare() -> None:
    """Trains the digits with CABS and with two constant batch sizes, side by side."""
    cabs = RunConfig(learning_rate=0.5, examples=COMPARISON_EXAMPLES, evaluations=60)
    configs = {
        "CABS": cabs,
        "constant 16": dataclasses.replace(cabs, method="constant", batch_size=16),
        "constant 128": dataclasses.replace(cabs, method="constant", batch_size=128),
    }
    with user_errors(ValueError, OSError):
        experiments = {label: set_up(config) for label, config in configs.items()}
        out = run_folder.fresh_folder(RUNS, "digits-comparison")
    folders = {label: out / label.lower().replace(" ", "-") for label in configs}
    train_and_plot(experiments, folders, out / run_folder.FIGURE)


def run(options: dict[str, Any]) -> None:
    """Trains once, as the options of `run` say."""
    out, data_dir = options.pop("out", None), options.pop("data_dir", None)
    resume, schedule = options.pop("resume", False), schedule_of(options)
    if resume and out is None:
        raise UserError("--resume needs --out, the folder of the run to continue")
    mesh = mesh_of_processes(options)
    writes = jax.process_index() == 0
    with user_errors(ValueError, OSError):
        if resume and mesh is None:
            options = stored_options(out, options)
        config = RunConfig(**options)
        if out is not None and writes and not resume:
            run_folder.check_unused(out)
        if resume and is_finished(out, mesh):
            print(f"{out} holds a finished run; there is nothing to resume")
            return
        experiment = set_up(config, data_dir)
        if out is None and writes:
            out = run_folder.fresh_folder(RUNS, f"{experiment.dataset.name}-{config.method}")
    if not writes:
        train(experiment, None, mesh=mesh, checkpoints=Checkpoints(None), resume=resume)
        return
    size = f" {config.batch_size}" if config.fixed_size else ""
    label = config.method + size
    with user_errors(OSError), Checkpoints(out / checkpoint.FOLDER, schedule) as checkpoints:
        train_and_plot(
            {label: experiment}, {label: out}, out / run_folder.FIGURE, mesh, checkpoints, resume
        )


def schedule_of(options: dict[str, Any]) -> Schedule:
    """When to write checkpoints, taking what says so out of `options`."""
    names = {
        "every_steps": "checkpoint_every_steps",
        "every_minutes": "checkpoint_every_minutes",
        "keep": "keep_checkpoints",
    }
    given = {field: options.pop(name) for field, name in names.items() if name in options}
    with user_errors(ValueError):
        return Schedule(**given).checked()


def stored_options(out: Path, given: dict[str, Any]) -> dict[str, Any]:
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
            raise run_folder.ResumeError(f"{out / run_folder.CONFIG} holds an unknown key: {key}")
        kind: Any = fields[key].type
        if not isinstance(value, kind) and not (isinstance(value, int) and isinstance(0.5, kind)):
            raise run_folder.ResumeError(f"{out / run_folder.CONFIG} holds {value!r} as {key}")
    return stored


def is_finished(out: Path, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether the first process finds a summary in `out`, as all processes are told."""
    finished = np.int32(jax.process_index() == 0 and run_folder.read_summary(out) is not None)
    return bool(finished if mesh is None else multihost_utils.broadcast_one_to_all(finished))


def mesh_of_processes(options: dict[str, Any]) -> jax.sharding.Mesh | None:
    """Joins the other processes if told to, taking what says so out of `options`.

    Returns:
        One axis over all devices of all processes, or None.
    """
    distributed = options.pop("distributed", False)
    names = ("coordinator", "num_processes", "process_id")
    given = {name: options.pop(name) for name in names if name in options}
    if not distributed:
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} goes with --distributed")
        return None
    with user_errors(ValueError, RuntimeError):
        jax.distributed.initialize(
            given.get("coordinator"), given.get("num_processes"), given.get("process_id")
        )
    return jax.make_mesh((jax.device_count(),), ("data",))


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
    first = next(iter(experiments.values()))
    title = (
        f"{first.dataset.name}, {first.config.model}, learning rate {first.config.learning_rate:g}"
    )

    def draw() -> None:
        """The runs that have begun."""
        begun = [label for label in folders if (folders[label] / run_folder.METRICS).exists()]
        results = {label: run_folder.read(folders[label]) for label in begun}
        shown = {label: result for label, result in results.items() if result.metrics}
        if shown:
            figure.plot(shown, figure_path, title)

    summaries = {}
    with (
        user_errors(OSError, run_folder.ResumeError),
        display.progress_bars(console) as bars,
        display.refreshed(draw, console),
    ):
        for label, experiment in experiments.items():
            observe = display.observer(bars, label, experiment.config)
            summaries[label] = train(experiment, folders[label], observe, mesh, checkpoints, resume)
    with user_errors(OSError):
        draw()
    console.print(display.summary_table(summaries))
    console.print(f"figure: {figure_path}", soft_wrap=True)


def soak(options: dict[str, Any]) -> None:
    """Soaks for as long as the options say."""
    from experiments.soak import soak as soaking

    with user_errors(soaking.SoakError):
        soaking.soak(options["minutes"], options["seed"], Console())


def benchmark_names() -> list[str]:
    """The modules of `experiments.benchmarks` that can be run."""
    modules = pkgutil.iter_modules(benchmarks.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def bench(name: str, *arguments: str) -> None:
    """Runs a benchmark, imported only now for some need packages that the others do not."""
    if name not in benchmark_names():
        known = ", ".join(benchmark_names())
        raise UserError(f"unknown benchmark {name!r}; known benchmarks: {known}")
    importlib.import_module(f"experiments.benchmarks.{name}").main(arguments)


def _integer_or_buckets(text: str) -> int | str:
    return text if text == BUCKETS else int(text)
