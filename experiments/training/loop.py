"""The loop of a run: steps, lines, evaluations and checkpoints, and how far it has come."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments.training import averages, run_folder
from experiments.training.checkpoint import FOLDER, Checkpoints
from experiments.training.config import RunConfig
from experiments.training.evaluate import Evaluation
from experiments.training.shared_programs import SharedStep
from experiments.training.step import StepInfo


class Progress(NamedTuple):
    """What a checkpoint holds beside the arrays, for JSON.

    Attributes:
      identity: The run's configuration, and the fingerprint of its data.
      written: Bytes of the metrics and of the evaluations.
      dispatched: Number, size and examples of each step without a line, and its numbers.
      loader: The loader's state.
    """

    identity: dict[str, Any]
    written: list[int]
    step: int
    examples: int
    seconds: float
    compile_seconds: float
    compilations: int
    evaluation: dict[str, Any]
    evaluated: int
    first_loss: float
    dispatched: list[list[Any]]
    loader: dict[str, Any]

    @classmethod
    def checked(cls, saved: Mapping[str, Any]) -> Self:
        """What was read, if it is complete.

        Raises:
          ResumeError: It lacks something, as another version of this program may have written it.
        """
        if missing := [name for name in cls._fields if name not in saved]:
            raise run_folder.ResumeError(
                f"the checkpoint to resume lacks {', '.join(missing)}, for another version wrote "
                f"it: resume with that version, or remove {FOLDER} from the run's folder to start "
                "from the first step."
            )
        return cls(**{name: saved[name] for name in cls._fields})


@dataclasses.dataclass
class Loop:
    """A run under way: what it works with, and from `started` on how far it has come."""

    config: RunConfig
    params: PyTree
    opt_state: PyTree
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
    first_loss: float = math.inf  # on the training examples, of the initial parameters
    without_progress: bool = False

    @property
    def done(self) -> int:
        """Steps or examples, whichever limits the run."""
        return self.step if self.config.limit[0] == "step" else self.examples

    @property
    def evaluations_due(self) -> int:
        """How many evaluations the steps so far ask for."""
        return self.done * self.config.evaluations // self.config.limit[1]

    @property
    def finished(self) -> bool:
        """Whether no step is left to make."""
        return self.diverged or self.without_progress or self.done >= self.config.limit[1]

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
        """Evaluates if the steps so far ask for it, or if these are the last."""
        if self.diverged or self.evaluations_due > self.evaluated:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluates the parameters as they are, with the clock stopped."""
        with_test = self.evaluations_due > self.config.evaluations - (
            self.config.test_evaluations or self.config.evaluations + 1
        )
        self.evaluation = {
            "step": self.step,
            "examples": self.examples,
            "epoch": self.examples / self.train_size,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds + self.train_step.seconds_waited,
            **self._evaluated(self.params, with_test),
        }
        if self.config.averages:
            for name in averages.NAMES:
                averaged = self._evaluated(getattr(self.opt_state, name), with_test)
                self.evaluation |= {f"{name}_{key}": value for key, value in averaged.items()}
        self.evaluations_file.write(self.evaluation)
        self.evaluated = self.evaluations_due
        self._judge_progress(self.evaluation["train_loss"])
        self.started = time.perf_counter() - self.seconds

    def _evaluated(self, params: PyTree, with_test: bool) -> dict[str, float | None]:
        on_train = self.evaluate_on(params, self.train_subset)
        on_test = self.evaluate_on(params, self.test_subset) if with_test else None
        return {
            "train_loss": on_train.loss,
            "train_accuracy": on_train.accuracy,
            "test_loss": on_test and on_test.loss,
            "test_accuracy": on_test and on_test.accuracy,
        }

    def _judge_progress(self, loss: float) -> None:
        if self.step == 0:
            self.first_loss = loss
        half_done = 2 * self.done >= self.config.limit[1]
        stuck = not loss <= 0.99 * self.first_loss
        self.without_progress = self.config.stop_without_progress and half_done and stuck

    def save(self, checkpoints: Checkpoints, identity: dict[str, Any]) -> None:
        """Writes a checkpoint of this moment, from which `set_state` continues."""
        self.metrics_file.sync()
        self.evaluations_file.sync()
        progress = Progress(
            identity=identity,
            written=[self.metrics_file.size, self.evaluations_file.size],
            step=self.step,
            examples=self.examples,
            seconds=time.perf_counter() - self.started,
            compile_seconds=self.compile_seconds + self.train_step.seconds_waited,
            compilations=self.compilations + self.train_step.compilations,
            evaluation=self.evaluation,
            evaluated=self.evaluated,
            first_loss=self.first_loss,
            dispatched=[
                [*counts, [_decimal(x) for x in jax.device_get(info)]]
                for *counts, info in self.dispatched
            ],
            loader=self.loader.get_state(),
        )
        checkpoints.save(self.step, (self.params, self.opt_state), progress._asdict())

    def set_state(self, saved: Progress) -> None:
        """Goes back to where `save` was called."""
        self.step, self.examples, self.seconds = saved.step, saved.examples, saved.seconds
        self.compile_seconds, self.compilations = saved.compile_seconds, saved.compilations
        self.evaluation, self.evaluated = saved.evaluation, saved.evaluated
        self.first_loss = saved.first_loss
        self.dispatched.extend(
            (step, size, examples, StepInfo(*info))
            for step, size, examples, info in saved.dispatched
        )
        self.loader.set_state(saved.loader)
        self.started = time.perf_counter() - self.seconds

    def summary(self) -> dict[str, Any]:
        """What the run came to, as `summary.json` holds it."""
        return {
            "train_loss": self.evaluation["train_loss"],
            "test_accuracy": self.evaluation["test_accuracy"],
            "steps": self.step,
            "examples": self.examples,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds + self.train_step.seconds_waited,
            "compilations": self.compilations + self.train_step.compilations,
            "diverged": self.diverged,
            "without_progress": self.without_progress,
        }


def _decimal(value: np.ndarray | jax.Array) -> float:
    """The shortest decimal that is this float32: 0.1 rather than 0.10000000149011612."""
    return float(str(value))
