"""What users and machines do to data and loaders: files that move, two readers, forks."""

import multiprocessing
import random
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import cabs_jax
from experiments import datasets

CLASSES, IMAGES, MOVES = 3, 12, 3
READERS, EXAMPLES, PASSES = 2, 400, 3
SECONDS = 60  # within which a child has answered


class AttackError(Exception):
    """Something was mixed up, lost or repeated."""


def move_files(folder: Path, dice: random.Random, counts: Counter[str]) -> None:
    """Moves images from class to class, each time loading them: labels are those of the folders.

    Args:
      folder: Holds the data set, which is made where it is missing, and what was decoded of it.
      dice: Chooses the images and the classes.
      counts: Gains how often files moved.

    Raises:
      AttackError: An image came with the label of the class that it once was in.
    """
    root = folder / "images"
    for number in range(2 * IMAGES):
        split, label = ("train", "test")[number % 2], number // 2 % CLASSES
        path = root / split / f"class {label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)
    for _ in range(MOVES):
        dataset = datasets.load(root, cache_dir=folder / "cache")
        for split, examples in (("train", dataset.train), ("test", dataset.test)):
            loaded = {
                (int(image.flat[0]), dataset.class_names[label])
                for image, label in zip(examples["input"], examples["label"], strict=True)
            }
            on_disk = {(int(p.stem), p.parent.name) for p in root.glob(f"{split}/*/*.png")}
            if loaded != on_disk:
                raise AttackError(f"of {split}, {loaded ^ on_disk} are not where they lie.")
        for path in dice.sample(sorted(root.glob("*/*/*.png")), 2):
            label = dice.randrange(CLASSES)
            path.rename(path.parents[1] / f"class {label}" / path.name)
            counts["files moved"] += 1


def read_together(dice: random.Random, counts: Counter[str]) -> None:
    """Two threads share a loader: together they read every example once a pass.

    Raises:
      AttackError: One came twice, or not at all.
    """
    size = dice.choice([size for size in range(1, 51) if EXAMPLES % size == 0])
    seen: list[list[int]] = [[] for _ in range(READERS)]
    turns = iter(range(PASSES * EXAMPLES // size))
    with cabs_jax.BatchLoader(np.arange(EXAMPLES), size, dice.randrange(1000)) as loader:

        def read(mine: list[int]) -> None:
            while next(turns, None) is not None:
                mine.extend(next(loader).tolist())

        threads = [threading.Thread(target=read, args=(mine,)) for mine in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    times = Counter(example for mine in seen for example in mine)
    wrong = [example for example in range(EXAMPLES) if times[example] != PASSES]
    if wrong:
        raise AttackError(f"of two readers' examples, {wrong} came not {PASSES} times.")
    counts["batches by two readers"] += PASSES * EXAMPLES // size


def fork(dice: random.Random, counts: Counter[str]) -> None:
    """A forked process is refused the loader, goes on with its own, and leaves ours as it was.

    Raises:
      AttackError: It was not refused, read other examples, or gave no answer.
    """
    size, seed = dice.randrange(1, 50), dice.randrange(1000)

    def child() -> None:
        try:
            next(loader)
        except RuntimeError:
            with cabs_jax.BatchLoader(np.arange(EXAMPLES), size, seed) as own:
                own.set_state(loader.get_state())
                sender.send(next(own).tolist())

    receiver, sender = multiprocessing.Pipe(duplex=False)
    with (
        receiver,
        sender,
        cabs_jax.BatchLoader(np.arange(EXAMPLES), size, seed) as loader,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # that a fork of several threads may deadlock
        next(loader)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        try:
            theirs = receiver.recv() if receiver.poll(SECONDS) else None
        finally:
            process.kill()
            process.join()
            process.close()
        ours = next(loader).tolist()
    if theirs != ours:
        raise AttackError(f"a fork read {theirs} where this process read {ours}.")
    counts["forks"] += 1
