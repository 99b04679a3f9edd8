"""One training run: set-up, loop, evaluation, files."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import cabs_jax
from cabs_jax.statistics import PyTree
from experiments import datasets
from experiments.training import methods, models, run_folder
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import BUCKETS, RunConfig
from experiments.training.evaluate import make_evaluate
from experiments.training.loop import Loop, Progress
from experiments.training.shared_programs import SharedPrograms
from experiments.training.step import make_train_step

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
        dataset.input_shape,
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
    shared: SharedPrograms | None = None,
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
      shared: What runs of the same net and data share, compiled; None compiles anew.

    Returns:
      The summary, as written.

    Raises:
      OSError: `out` is not empty, in use, removed or cannot be written; lines already written stay.
      ResumeError: The run to resume had another configuration or other data, or another version of
        this program wrote it.
      Interrupted: A signal came; a checkpoint was written.
    """
    config = experiment.config
    identity: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    with run_folder.held(out, identity, resume) as check_folder:
        if checkpoints is not None:
            identity["fingerprint of the data set"] = datasets.fingerprint(experiment.dataset)
        arrays, saved = _beginning(experiment, checkpoints if resume else None, identity)
        with _under_way(experiment, arrays, saved, out, observe, mesh, shared) as loop:
            if saved is None:
                loop.evaluate()
            while not loop.finished:
                check_folder()
                loop.dispatch_step()
                loop.write_metrics()
                loop.evaluate_if_due()
                if checkpoints is not None and not loop.finished and checkpoints.due(loop.step):
                    loop.save(checkpoints, identity)
                    checkpoints.stop_if_asked(loop.step)
            check_folder()
            if checkpoints is not None and not loop.diverged:
                loop.save(checkpoints, identity)
                checkpoints.wait()
            summary = loop.summary()
        check_folder()
        if out is not None:
            run_folder.write_json(out / run_folder.SUMMARY, summary)
    return summary


def _beginning(
    experiment: Experiment, checkpoints: Checkpoints | None, identity: Mapping[str, Any]
) -> tuple[tuple[PyTree, PyTree], Progress | None]:
    """Parameters and optimizer state, and how far they have come if they are a checkpoint's."""
    params = experiment.model.params
    # The step donates both, so each leaf needs a buffer of its own, and the model keeps its.
    arrays = jax.tree.map(jnp.copy, (params, experiment.optimizer.init(params)))
    if checkpoints is None or (restored := checkpoints.restore(arrays)) is None:
        return arrays, None
    arrays, saved = restored[0], Progress.checked(restored[1])
    run_folder.check_equal("the run to resume", saved.identity, identity)
    return jax.tree.map(jnp.array, arrays), saved


@contextlib.contextmanager
def _under_way(
    experiment: Experiment,
    arrays: tuple[PyTree, PyTree],
    saved: Progress | None,
    out: Path | None,
    observe: Callable[[dict[str, Any]], None],
    mesh: jax.sharding.Mesh | None,
    shared: SharedPrograms | None,
) -> Iterator[Loop]:
    """The run where it was `saved`, its files and its loader open."""
    config, dataset, model, optimizer = experiment
    first_size, sharding = int(cabs_jax.batch_size(arrays[1])), None
    if mesh is not None:
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
    sizes, padded = _shapes(config, 1 if mesh is None else mesh.size)
    metrics_bytes, evaluations_bytes = saved.written if saved else (0, 0)
    with (
        run_folder.Lines(out and out / run_folder.METRICS, metrics_bytes) as metrics_file,
        run_folder.Lines(
            out and out / run_folder.EVALUATIONS, evaluations_bytes
        ) as evaluations_file,
        cabs_jax.BatchLoader(
            dataset.train,
            first_size,
            config.seed,
            sharding=sharding,
            pad_to=sizes if padded else None,
            lag=config.lag,
        ) as loader,
        cabs_jax.CompiledStep(
            make_train_step(model.loss, optimizer, methods.variance(config), config.gated),
            sizes,
            batch_argnums=(2, 3),
            donate_argnums=(0, 1),
        )
        if shared is None
        else contextlib.nullcontext(shared.train_step(config)) as train_step,
    ):
        loop = Loop(
            config=config,
            params=arrays[0],
            opt_state=arrays[1],
            loader=loader,
            padded=padded,
            train_step=train_step,
            evaluate_on=make_evaluate(model.predict) if shared is None else shared.evaluate,
            train_subset=subset(
                dataset.train, config.evaluation_examples or TRAIN_EXAMPLES_EVALUATED
            ),
            test_subset=subset(
                dataset.test, None if config.test_evaluations else config.evaluation_examples
            ),
            train_size=len(dataset.train["label"]),
            metrics_file=metrics_file,
            evaluations_file=evaluations_file,
            observe=observe,
        )
        if saved is not None:
            loop.set_state(saved)
        yield loop


def _shapes(config: RunConfig, shards: int) -> tuple[tuple[int, ...], bool]:
    """The few sizes that batches have, and whether they are padded to them."""
    if shards > 1:
        return cabs_jax.buckets(*methods.bounds(config), multiple_of=shards), True
    if config.fixed_size:
        return (), False
    if config.round_to == BUCKETS:
        return methods.legal_sizes(config), False
    return cabs_jax.buckets(*methods.bounds(config)), True


def subset(split: dict[str, np.ndarray], count: int | None) -> dict[str, np.ndarray]:
    """The same `count` examples, drawn from all of the split, in every run; None is all of it."""
    if count is None:
        return split
    chosen = np.sort(np.random.default_rng(0).permutation(len(split["label"]))[:count])
    return {name: array[chosen] for name, array in split.items()}
