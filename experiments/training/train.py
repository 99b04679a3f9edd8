"""One training run: set-up, loop, evaluation, files."""

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import cabs_jax
from experiments import datasets
from experiments.training import methods, models, run_folder
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import BUCKETS, RunConfig
from experiments.training.evaluate import Evaluation, make_evaluate
from experiments.training.shared_programs import Programs, SharedStep
from experiments.training.step import StepInfo, make_train_step

TRAIN_EXAMPLES_EVALUATED = 2_000


class Experiment(NamedTuple):
    """A run with everything loaded and built, ready to start."""

    config: RunConfig
    dataset: datasets.Dataset
    model: models.Model
    optimizer: optax.GradientTransformationExtraArgs


def set_up(
    config: RunConfig,
    data_dir: str | Path | None = None,
    dataset: datasets.Dataset | None = None,
) -> Experiment:
    """Builds the optimizer, loads the data and initialises the model.

    Args:
      config: The run.
      data_dir: Holds the data sets.
      dataset: That of the run, if it was loaded before.

    Raises:
      ValueError: The method, data set or model is unknown, or the model does not fit the data.
      OSError: The data is missing, damaged or cannot be downloaded.
    """
    optimizer = methods.build(config)
    if dataset is None:
        dataset = datasets.load(config.dataset, data_dir=data_dir)
    model = models.build(
        config.model,
        dataset.image_shape,
        dataset.num_classes,
        width=config.width,
        seed=config.seed,
    )
    return Experiment(config, dataset, model, optimizer)


def train(
    experiment: Experiment,
    out: Path | None,
    observe: Callable[[dict[str, Any]], None] = lambda metrics: None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Runs the experiment and writes config, metrics, evaluations and summary into `out`.

    `seconds` is wall-clock time since the first step began: data, training and compilation
    (whose share is `compile_seconds`), but not evaluation, which only the measurement needs.
    A run whose loss is no longer finite has diverged, and stops there, or `lag` steps later.

    A run that was cut off at any moment and is resumed from its last checkpoint writes the same
    lines as one that was not, but for `seconds` and `compile_seconds`, which go on from there.

    Args:
      experiment: As `set_up` makes it. The model's parameters are left intact.
      out: A folder that is missing or empty; None writes nothing, as all processes but one do.
      observe: Called with each line of the metrics after it was written.
      mesh: Splits batches over all its devices, which may belong to several processes.
      checkpoints: Writes one whenever it says so, and one at the end.
      resume: Continues the run in `out` from its newest checkpoint, or from the first step if
        there is none.
      programs: What runs of the same net and data share, compiled; None compiles anew.

    Returns:
      The summary, as written.

    Raises:
      OSError: `out` is not empty or cannot be written; lines already written stay.
      ResumeError: The run to resume had another configuration or other data.
      Interrupted: A signal came; a checkpoint was written.
    """
    config, dataset, model, optimizer = experiment
    identity: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    if out is not None:
        if resume:
            run_folder.check_resumable(out, identity)
        else:
            run_folder.check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(out / run_folder.CONFIG, identity)

    # The step donates both, so each leaf needs a buffer of its own, and the model keeps its.
    arrays = jax.tree.map(jnp.copy, (model.params, optimizer.init(model.params)))
    saved: dict[str, Any] | None = None
    if checkpoints is not None:
        identity["fingerprint of the data set"] = datasets.fingerprint(dataset)
        if resume and (restored := checkpoints.restore(arrays)):
            arrays, saved = restored
            run_folder.check_equal("the run to resume", saved["identity"], identity)
            arrays = jax.tree.map(jnp.array, arrays)
    first_size, sharding = int(cabs_jax.batch_size(arrays[1])), None
    if mesh is not None:
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
    params, opt_state = arrays

    sizes, padded = _shapes(config, 1 if mesh is None else mesh.size)
    written = saved["written"] if saved else [0, 0]
    with (
        run_folder.Lines(out and out / run_folder.METRICS, written[0]) as metrics_file,
        run_folder.Lines(out and out / run_folder.EVALUATIONS, written[1]) as evaluations_file,
        cabs_jax.BatchLoader(
            dataset.train,
            first_size,
            config.seed,
            sharding=sharding,
            pad_to=sizes if padded else None,
            lag=config.lag,
        ) as loader,
        cabs_jax.CompiledStep(
            make_train_step(model.loss, optimizer, methods.variance(config)),
            sizes,
            batch_argnums=(2, 3),
            donate_argnums=(0, 1),
        )
        if programs is None
        else programs.train_step(config) as train_step,
    ):
        run = _Run(
            config,
            params,
            opt_state,
            loader,
            padded,
            train_step,
            make_evaluate(model.predict) if programs is None else programs.evaluate,
            _subset(dataset.train, config.evaluation_examples or TRAIN_EXAMPLES_EVALUATED),
            _subset(dataset.test, config.evaluation_examples),
            len(dataset.train["label"]),
            metrics_file,
            evaluations_file,
            observe,
        )
        if saved is None:
            run.evaluate()
        else:
            run.set_state(saved)
        while not run.finished:
            run.dispatch_step()
            run.write_metrics()
            run.evaluate_if_due()
            if checkpoints is not None and not run.finished and checkpoints.due(run.step):
                run.save(checkpoints, identity)
                checkpoints.stop_if_asked(run.step)
        if checkpoints is not None and not run.diverged:
            run.save(checkpoints, identity)
            checkpoints.wait()

    summary = run.summary()
    if out is not None:
        run_folder.write_json(out / run_folder.SUMMARY, summary)
    return summary


@dataclasses.dataclass
class _Run:
    """A run under way: what it works with, and below `started` how far it has come."""

    config: RunConfig
    params: Any
    opt_state: Any
    loader: cabs_jax.BatchLoader
    padded: bool
    train_step: cabs_jax.CompiledStep | SharedStep
    evaluate_on: Callable[[Any, dict[str, np.ndarray]], Evaluation]
    train_subset: dict[str, np.ndarray]
    test_subset: dict[str, np.ndarray]
    train_size: int
    metrics_file: run_folder.Lines
    evaluations_file: run_folder.Lines
    observe: Callable[[dict[str, Any]], None]

    started: float = dataclasses.field(default_factory=time.perf_counter)
    step: int = 0
    examples: int = 0
    seconds: float = 0.0  # when the last line of the metrics was written
    compile_seconds: float = 0.0  # of the processes before this one, as are the compilations
    compilations: int = 0
    evaluated: int = 0  # after the first evaluation, that of the initial parameters
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # the last one
    dispatched: deque[tuple[int, int, int, StepInfo]] = dataclasses.field(default_factory=deque)
    diverged: bool = False

    @property
    def done(self) -> int:
        """Steps or examples, whichever limits the run."""
        return self.step if self.config.limit[0] == "step" else self.examples

    @property
    def evaluations_due(self) -> int:
        return self.done * self.config.evaluations // self.config.limit[1]

    @property
    def finished(self) -> bool:
        return self.diverged or self.done >= self.config.limit[1]

    def dispatch_step(self) -> None:
        """Starts the next step; its numbers are futures."""
        batch, mask = next(self.loader) if self.padded else (next(self.loader), None)
        self.params, self.opt_state, info = self.train_step(
            self.params, self.opt_state, batch, mask
        )
        self.loader.batch_size = info.next_batch_size
        size = len(batch["label"]) if mask is None else int(mask.sum())
        self.step += 1
        self.examples += size
        self.dispatched.append((self.step, size, self.examples, info))

    def write_metrics(self) -> None:
        """Writes the lines of the steps dispatched, but for the last `lag` of them."""
        all_of_them = self.finished or self.evaluations_due > self.evaluated
        while self.dispatched and not self.diverged:
            if len(self.dispatched) <= self.config.lag and not all_of_them:
                break  # reading its numbers would wait for it
            step, size, examples, info = self.dispatched.popleft()
            info = jax.device_get(info)
            metrics: dict[str, Any] = {
                "step": step,
                "batch_size": size,
                "loss": _decimal(info.loss),
                "gradient_variance": _decimal(info.gradient_variance),
                "learning_rate": _decimal(info.learning_rate),
                "examples": examples,
                "epoch": examples / self.train_size,
                "seconds": time.perf_counter() - self.started,
            }
            self.metrics_file.write(metrics)
            self.observe(metrics)
            self.seconds, self.diverged = metrics["seconds"], not math.isfinite(metrics["loss"])

    def evaluate_if_due(self) -> None:
        if self.diverged or self.evaluations_due > self.evaluated:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluates the parameters as they are, with the clock stopped."""
        on_train = self.evaluate_on(self.params, self.train_subset)
        on_test = self.evaluate_on(self.params, self.test_subset)
        self.evaluation = {
            "step": self.step,
            "examples": self.examples,
            "epoch": self.examples / self.train_size,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds + self.train_step.seconds_waited,
            "train_loss": on_train.loss,
            "train_accuracy": on_train.accuracy,
            "test_loss": on_test.loss,
            "test_accuracy": on_test.accuracy,
        }
        self.evaluations_file.write(self.evaluation)
        self.evaluated = self.evaluations_due
        self.started = time.perf_counter() - self.seconds

    def save(self, checkpoints: Checkpoints, identity: dict[str, Any]) -> None:
        """Writes a checkpoint of this moment, from which `set_state` continues."""
        self.metrics_file.sync()
        self.evaluations_file.sync()
        progress = {
            "identity": identity,
            "written": [self.metrics_file.size, self.evaluations_file.size],
            "step": self.step,
            "examples": self.examples,
            "seconds": time.perf_counter() - self.started,
            "compile_seconds": self.compile_seconds + self.train_step.seconds_waited,
            "compilations": self.compilations + self.train_step.compilations,
            "evaluation": self.evaluation,
            "evaluated": self.evaluated,
            "dispatched": [
                (*counts, [_decimal(x) for x in jax.device_get(info)])
                for *counts, info in self.dispatched
            ],
            "loader": self.loader.get_state(),
        }
        checkpoints.save(self.step, (self.params, self.opt_state), progress)

    def set_state(self, saved: dict[str, Any]) -> None:
        """Goes back to where `save` was called."""
        self.step, self.examples, self.seconds = saved["step"], saved["examples"], saved["seconds"]
        self.compile_seconds, self.compilations = saved["compile_seconds"], saved["compilations"]
        self.evaluation, self.evaluated = saved["evaluation"], saved["evaluated"]
        self.dispatched.extend((*counts, StepInfo(*info)) for *counts, info in saved["dispatched"])
        self.loader.set_state(saved["loader"])
        self.started = time.perf_counter() - self.seconds

    def summary(self) -> dict[str, Any]:
        return {
            "train_loss": self.evaluation["train_loss"],
            "test_accuracy": self.evaluation["test_accuracy"],
            "steps": self.step,
            "examples": self.examples,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds + self.train_step.seconds_waited,
            "compilations": self.compilations + self.train_step.compilations,
            "diverged": self.diverged,
        }


def _shapes(config: RunConfig, shards: int) -> tuple[tuple[int, ...], bool]:
    """The few sizes that batches have, and whether they are padded to them."""
    if shards > 1:
        return cabs_jax.buckets(*methods.bounds(config), multiple_of=shards), True
    if config.fixed_size:
        return (), False
    if config.round_to == BUCKETS:
        return methods.legal_sizes(config), False
    return cabs_jax.buckets(*methods.bounds(config)), True


def _decimal(value: np.ndarray | jax.Array) -> float:
    """The shortest decimal that is this float32: 0.1 rather than 0.10000000149011612."""
    return float(str(value))


def _subset(split: dict[str, np.ndarray], count: int | None) -> dict[str, np.ndarray]:
    """The same `count` examples, drawn from all of the split, in every run; None is all of it."""
    if count is None:
        return split
    chosen = np.sort(np.random.default_rng(0).permutation(len(split["label"]))[:count])
    return {name: array[chosen] for name, array in split.items()}
