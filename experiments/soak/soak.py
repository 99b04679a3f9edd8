"""What goes wrong in weeks, in minutes: kills, faults of the source, NaN, restarts.

Rounds follow each other until the time is up. Each trains a run whole in this process, and again
in processes that are killed and resumed (`kills`); then it trains on a stream of random
batch sizes whose source fails and whose batches hold NaN, and which is restarted from its state;
and then come the `attacks`.
Anything lost, repeated, wrong or leaked ends the soak with an error.
"""

import gc
import json
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import cabs_jax
from experiments.soak import attacks, kills
from experiments.training import checkpoint
from experiments.training.checkpoint import Checkpoints, Schedule
from experiments.training.config import RunConfig
from experiments.training.shared_programs import cache_settings
from experiments.training.train import set_up, train

STEPS = 60
RUNS: tuple[dict[str, Any], ...] = (
    {"method": "cabs"},
    {"method": "cabs", "lag": 1},
    {"method": "cabs", "lag": 2, "round_to": "buckets"},
    {"method": "noise_scale", "lag": 1},
    {"method": "constant", "batch_size": 24},
)
KILLS_A_ROUND = 4
# No name of a folder may be read as markup, mathematics, a format, an option or an escape.
FOLDERS = ("-", "$x^$", "<b>{{ 7 }}%s {0}", "a\nb\x1b", "数据 🙂", "x" * 200)

BATCHES_A_ROUND = 500
EXAMPLES, FEATURES, LARGEST = 5_000, 12, 512
FAULT_RATE, NAN_RATE, RESTART_RATE = 1e-4, 0.02, 0.02
MOVE_RATE = 0.3

WARM_ROUNDS = len(RUNS)  # every kind of run was compiled once
MEMORY_LEAK = 0.1  # of a warm start's memory, which the end may exceed it by

TrainStep = Callable[[Any, Any, Any, np.ndarray], tuple[Any, Any]]


class SoakError(Exception):
    """Something was lost, repeated, wrong or leaked."""


class Resources(NamedTuple):
    """What this process holds: resident memory in MiB, threads, and open files."""

    memory: float
    threads: int
    files: int


def soak(minutes: float, seed: int, console: Console) -> Counter[str]:
    """Rounds until `minutes` are over, at least one; prints them and a report.

    Returns:
      How often each thing happened.

    Raises:
      SoakError: Something was lost, repeated, wrong or leaked.
    """
    dice, counts, step = random.Random(seed), Counter[str](), make_step()
    history: list[Resources] = []
    ends = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="cabs_jax-soak-") as temporary:
        folder = Path(temporary)
        settings = cache_settings(folder / "compiled")
        for name, value in settings.items():  # so that what this process compiled, all others find
            jax.config.update(name, value)
        while not history or time.monotonic() < ends:
            options = {**RUNS[len(history) % len(RUNS)], "seed": dice.randrange(1000)}
            kill_and_resume(folder / "runs", options, dice, settings, counts)
            read_and_train(step, dice, counts)
            attack(folder / "data", dice, counts)
            history.append(resources())
            console.print(
                f"round {len(history)}: {counts['kills']} kills, {counts['batches']:,} batches, "
                f"{history[-1].memory:,.0f} MiB, {history[-1].threads} threads, "
                f"{history[-1].files} files",
                highlight=False,
            )
    console.print(report(counts, history))
    console.print(check_for_leaks(history), highlight=False)
    return counts


def kill_and_resume(
    folder: Path,
    options: Mapping[str, Any],
    dice: random.Random,
    settings: Mapping[str, Any],
    counts: Counter[str],
) -> None:
    """Trains whole, then again with kills; both must write the same. Leaves no files."""
    options = {**options, "steps": STEPS, "width": 0.1, "learning_rate": 1.0}
    whole, killed = folder / "whole", folder / dice.choice(FOLDERS)
    with Checkpoints(whole / checkpoint.FOLDER, Schedule(every_steps=7)) as checkpoints:
        train(set_up(RunConfig(**options)), whole, checkpoints=checkpoints)

    every_steps = dice.choice((1, 3, 10))
    for _ in range(KILLS_A_ROUND):
        moment = kills.run_and_kill(killed, options, dice, settings, every_steps)
        if moment is None:
            counts["ended before the kill"] += 1
            break
        counts["kills"] += 1
        counts[f"killed {moment}"] += 1
        if dice.random() < MOVE_RATE and killed.exists():
            moved = killed.with_name(dice.choice(FOLDERS))
            if moved != killed:
                killed = killed.rename(moved)
                counts["folders of runs moved"] += 1
    if kills.suspend_and_requeue(killed, options, dice, settings, every_steps):
        counts["suspended and requeued"] += 1
    kills.run_to_the_end(killed, options, settings, every_steps)
    if kills.untimed(killed) != kills.untimed(whole):
        kept = shutil.copytree(
            folder, tempfile.mkdtemp(prefix="cabs_jax-soak-"), dirs_exist_ok=True
        )
        raise SoakError(f"a run that was killed differs from one that was not: see {kept}.")
    shutil.rmtree(folder)
    counts["lines compared"] += STEPS


def attack(folder: Path, dice: random.Random, counts: Counter[str]) -> None:
    """One round of the attacks on data and loaders. Leaves no files."""
    try:
        attacks.move_files(folder, dice, counts)
        attacks.read_together(dice, counts)
        attacks.fork(dice, counts)
    except attacks.AttackError as error:
        raise SoakError(str(error)) from error
    shutil.rmtree(folder)


class FaultySource:
    """Records computed from their index; now and then one raises, or has another shape."""

    def __init__(self, seed: int):
        self._dice = random.Random(seed)
        self.raised = self.ragged = 0

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        chance = self._dice.random()
        if chance < FAULT_RATE:
            self.raised += 1
            raise OSError("injected fault of the source.")
        if chance < 2 * FAULT_RATE:
            self.ragged += 1
            return {"x": np.zeros(FEATURES + 1, np.float32), "index": index}
        x = np.cos(np.arange(1, FEATURES + 1, dtype=np.float32) * index)
        return {"x": x, "index": index}


def make_step() -> TrainStep:
    """A compiled step of CABS that passes over updates that are not finite, and its state."""

    def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return (params @ x[1:] - x[0]) ** 2

    moments_of, optimizer = cabs_jax.gradient_moments(loss_fn), make_optimizer()

    @jax.jit
    def step(params: Any, state: Any, x: Any, mask: np.ndarray) -> tuple[Any, Any]:
        m = moments_of(params, x, mask=mask)
        updates, state = optimizer.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state

    return step


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    """CABS that survives any number of updates that are not finite."""
    return optax.apply_if_finite(cabs_jax.cabs(0.02, max_batch_size=LARGEST), 2**31 - 1)


def read_and_train(step: TrainStep, dice: random.Random, counts: Counter[str]) -> None:
    """Trains on a faulty stream, its sizes random or CABS's, restarting it from its state."""
    source, seed, lag = FaultySource(dice.randrange(2**32)), dice.randrange(1000), dice.randrange(3)

    def start() -> cabs_jax.BatchLoader:
        return cabs_jax.BatchLoader(
            source, 16, seed, pad_to=cabs_jax.buckets(1, LARGEST, count=4), lag=lag
        )

    params = jnp.zeros(FEATURES - 1)
    state: Any = make_optimizer().init(params)
    seen, poisoned, loader = np.zeros(EXAMPLES, int), 0, start()
    for _ in range(BATCHES_A_ROUND):
        if dice.random() < RESTART_RATE:
            saved, size = json.dumps(loader.get_state()), loader.batch_size
            loader.close()
            loader = start()
            loader.set_state(json.loads(saved))
            loader.batch_size = size
            counts["restarts of the stream"] += 1
        batch, mask = _next(loader)
        indices = batch["index"][mask]
        np.add.at(seen, indices, 1)
        if seen.max() - seen.min() > 1:
            raise SoakError("an example came twice before another came once.")
        if dice.random() < NAN_RATE:
            batch["x"][dice.randrange(len(indices)), dice.randrange(FEATURES)] = np.nan
            poisoned += 1
        params, state = step(params, state, batch["x"], mask)
        chosen = int(cabs_jax.batch_size(state))
        if not (16 <= chosen <= LARGEST and np.isfinite(params).all()):
            raise SoakError(f"batch size {chosen}, parameters {params}.")
        loader.batch_size = dice.choice((chosen, dice.randrange(1, LARGEST + 1)))
        counts["batches"] += 1
        counts["examples"] += len(indices)
    position = loader.get_state()["position"]
    loader.close()
    if seen.sum() != position:
        raise SoakError(f"the loader gave {seen.sum()} examples and counted {position}.")
    if int(state.total_notfinite) != poisoned:
        raise SoakError(f"{poisoned} batches held NaN, {state.total_notfinite} were passed over.")
    counts["batches with NaN"] += poisoned
    counts["records that raised"] += source.raised
    counts["records of another shape"] += source.ragged


def _next(loader: cabs_jax.BatchLoader) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The next batch, asked for until the source gives it."""
    while True:
        try:
            batch: tuple[dict[str, np.ndarray], np.ndarray] = next(loader)
        except (OSError, ValueError) as error:
            if "injected" not in str(error) and "records differ in shape" not in str(error):
                raise
        else:
            return batch


def resources() -> Resources:
    """What this process holds now."""
    gc.collect()
    process = psutil.Process()
    memory = process.memory_info().rss / 2**20
    return Resources(memory, threading.active_count(), len(process.open_files()))


def report(counts: Counter[str], history: list[Resources]) -> Table:
    """What happened, and what the process held at the start, warm, and at the end."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("in all")
    table.add_column(f"{len(history)} rounds", justify="right")
    for what, count in sorted(counts.items()):
        table.add_row(what, f"{count:,}")
    warm = history[min(WARM_ROUNDS, len(history)) - 1]
    for field in Resources._fields:
        values = (getattr(moment, field) for moment in (history[0], warm, history[-1]))
        name = "memory (MiB)" if field == "memory" else field
        table.add_row(f"{name}: first, warm, last", ", ".join(f"{x:,.0f}" for x in values))
    return table


def check_for_leaks(history: list[Resources]) -> str:
    """Says what the rounds after a warm start tell of leaks.

    Raises:
      SoakError: The end holds more than a warm start did.
    """
    if len(history) <= WARM_ROUNDS:
        return f"leaks: not judged, for the first {WARM_ROUNDS} rounds warm up; give more minutes"
    warm, last = history[WARM_ROUNDS - 1], history[-1]
    if last.memory > warm.memory * (1 + MEMORY_LEAK):
        raise SoakError(f"memory grew from {warm.memory:,.0f} to {last.memory:,.0f} MiB.")
    if last.threads > warm.threads or last.files > warm.files:
        raise SoakError(f"threads or files leak: {warm} when warm, {last} at the end.")
    return f"leaks: none in the {len(history) - WARM_ROUNDS} rounds after {WARM_ROUNDS} to warm up"
