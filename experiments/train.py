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
from experiments import datasets, methods, models, records
from experiments.checkpoint import Checkpoints
from experiments.config import BUCKETS, RunConfig
from experiments.evaluate import make_evaluate
from experiments.programs import Programs
from experiments.step import StepInfo, make_train_step

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
        experiments.records.ResumeError: The run to resume had another configuration or other data.
        experiments.checkpoint.Interrupted: A signal came; a checkpoint was written.
    """
    config, dataset, model, optimizer = experiment
    identity: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    if out is not None:
        if resume:
            records.check_resumable(out, identity)
        else:
            records.check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
        records.write_json(out / records.CONFIG, identity)

    unit, limit = config.limit
    train_size = len(dataset.train["label"])
    evaluate = make_evaluate(model.predict) if programs is None else programs.evaluate
    train_subset = _subset(dataset.train, config.evaluation_examples or TRAIN_EXAMPLES_EVALUATED)
    test_subset = _subset(dataset.test, config.evaluation_examples)

    legal, padded = _shapes(config, 1 if mesh is None else mesh.size)
    # The step donates both, so each leaf needs a buffer of its own, and the model keeps its.
    params, opt_state = jax.tree.map(jnp.copy, (model.params, optimizer.init(model.params)))
    saved: dict[str, Any] | None = None
    if checkpoints is not None:
        identity["fingerprint of the data set"] = datasets.fingerprint(dataset)
        if resume and (restored := checkpoints.restore((params, opt_state))):
            arrays, saved = restored
            records.check_equal("the run to resume", saved["identity"], identity)
            params, opt_state = jax.tree.map(jnp.array, arrays)
    first_size, sharding = int(cabs_jax.batch_size(opt_state)), None
    if mesh is not None:
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        params, opt_state = jax.device_put(
            (params, opt_state), NamedSharding(mesh, PartitionSpec())
        )

    written = saved["written"] if saved else [0, 0]
    with (
        records.Lines(out and out / records.METRICS, written[0]) as metrics_file,
        records.Lines(out and out / records.EVALUATIONS, written[1]) as evaluations_file,
        cabs_jax.BatchLoader(
            dataset.train,
            first_size,
            config.seed,
            sharding=sharding,
            pad_to=legal if padded else None,
            lag=config.lag,
        ) as loader,
        cabs_jax.CompiledStep(
            make_train_step(model.loss, optimizer, methods.variance(config)),
            legal,
            batch_argnums=(2, 3),
            donate_argnums=(0, 1),
        )
        if programs is None
        else programs.train_step(config) as train_step,
    ):

        def evaluate_and_write(step: int, examples: int, seconds: float) -> dict[str, Any]:
            on_train, on_test = evaluate(params, train_subset), evaluate(params, test_subset)
            evaluation = {
                "step": step,
                "examples": examples,
                "epoch": examples / train_size,
                "seconds": seconds,
                "compile_seconds": compile_seconds + train_step.seconds_waited,
                "train_loss": on_train.loss,
                "train_accuracy": on_train.accuracy,
                "test_loss": on_test.loss,
                "test_accuracy": on_test.accuracy,
            }
            evaluations_file.write(evaluation)
            return evaluation

        def write_metrics(step: int, size: int, examples: int, info: StepInfo) -> dict[str, Any]:
            info = jax.device_get(info)
            metrics: dict[str, Any] = {
                "step": step,
                "batch_size": size,
                "loss": _decimal(info.loss),
                "gradient_variance": _decimal(info.gradient_variance),
                "learning_rate": _decimal(info.learning_rate),
                "examples": examples,
                "epoch": examples / train_size,
                "seconds": time.perf_counter() - started,
            }
            metrics_file.write(metrics)
            observe(metrics)
            return metrics

        def save_checkpoint() -> None:
            assert checkpoints is not None
            metrics_file.sync()
            evaluations_file.sync()
            progress = {
                "identity": identity,
                "written": [metrics_file.size, evaluations_file.size],
                "step": step,
                "examples": examples,
                "seconds": time.perf_counter() - started,
                "compile_seconds": compile_seconds + train_step.seconds_waited,
                "compilations": compilations + train_step.compilations,
                "evaluation": evaluation,
                "evaluated": evaluated,
                "dispatched": [
                    (*counts, [_decimal(x) for x in jax.device_get(info)])
                    for *counts, info in dispatched
                ],
                "loader": loader.get_state(),
            }
            checkpoints.save(step, (params, opt_state), progress)

        diverged = False
        dispatched: deque[tuple[int, int, int, StepInfo]] = deque()
        if saved is None:
            step, examples, seconds, evaluated = 0, 0, 0.0, 0
            compile_seconds, compilations = 0.0, 0
            evaluation = evaluate_and_write(step, examples, seconds)
        else:
            step, examples, seconds = saved["step"], saved["examples"], saved["seconds"]
            compile_seconds, compilations = saved["compile_seconds"], saved["compilations"]
            evaluation, evaluated = saved["evaluation"], saved["evaluated"]
            dispatched.extend((*counts, StepInfo(*info)) for *counts, info in saved["dispatched"])
            loader.set_state(saved["loader"])
        done = step if unit == "step" else examples
        started = time.perf_counter() - seconds
        while done < limit and not diverged:
            batch, mask = next(loader) if padded else (next(loader), None)
            params, opt_state, info = train_step(params, opt_state, batch, mask)
            loader.batch_size = info.next_batch_size

            size = len(batch["label"]) if mask is None else int(mask.sum())
            step, examples = step + 1, examples + size
            done = step if unit == "step" else examples
            due = done * config.evaluations // limit
            dispatched.append((step, size, examples, info))
            while dispatched and not diverged:
                if len(dispatched) <= config.lag and due == evaluated and done < limit:
                    break  # reading its numbers would wait for it
                metrics = write_metrics(*dispatched.popleft())
                seconds, diverged = metrics["seconds"], not math.isfinite(metrics["loss"])
            if diverged or due > evaluated:
                evaluation, evaluated = evaluate_and_write(step, examples, seconds), due
                started = time.perf_counter() - seconds
            if checkpoints is not None and done < limit and not diverged and checkpoints.due(step):
                save_checkpoint()
                checkpoints.stop_if_asked(step)
        if checkpoints is not None and not diverged:
            save_checkpoint()
            checkpoints.wait()

    summary = {
        "train_loss": evaluation["train_loss"],
        "test_accuracy": evaluation["test_accuracy"],
        "steps": step,
        "examples": examples,
        "seconds": seconds,
        "compile_seconds": compile_seconds + train_step.seconds_waited,
        "compilations": compilations + train_step.compilations,
        "diverged": diverged,
    }
    if out is not None:
        records.write_json(out / records.SUMMARY, summary)
    return summary


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
