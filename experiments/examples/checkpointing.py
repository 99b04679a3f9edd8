"""Checkpoints in a loop of one's own, with Orbax: cut off at any step, it goes on from the last.

Run it with `python -m experiments.examples.checkpointing FOLDER STEPS`, twice.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import cabs_jax

EVERY = 10  # steps


class GrainIterator:
    """A loader as an iterator that Grain saves and restores: its state is bytes.

    `grain.checkpoint.CheckpointSave(GrainIterator(loader))` and `CheckpointRestore` go where
    `JsonSave` and `JsonRestore` go below.
    """

    def __init__(self, loader: cabs_jax.BatchLoader):
        self.loader = loader

    def get_state(self) -> bytes:
        """The loader's state, in JSON."""
        return json.dumps(self.loader.get_state()).encode()

    def set_state(self, state: bytes) -> None:
        """Goes on where `get_state` was called."""
        self.loader.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        """Grain calls this after restoring; the loader reads ahead from its first batch on."""


def loss_fn(params: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
    """Cross entropy of a linear classifier."""
    logits = example["image"] @ params
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])
    return loss


def train(folder: Path, steps: int) -> list[float]:
    """Trains up to step `steps`, from the last checkpoint in `folder` on if there is one.

    Returns:
      The loss of each step that was made.
    """
    images, labels = load_digits(return_X_y=True)
    source = {"image": (images / 16).astype("float32"), "label": labels.astype("int32")}
    optimizer = cabs_jax.cabs(0.1, round_to=cabs_jax.buckets())
    params = jax.numpy.zeros((64, 10))
    state = optimizer.init(params)
    loader = cabs_jax.BatchLoader(source, batch_size=int(cabs_jax.batch_size(state)))
    moments_of = cabs_jax.gradient_moments(loss_fn)

    @jax.jit
    def train_step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        m = moments_of(params, batch)
        updates, state = optimizer.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state, m.value

    with ocp.CheckpointManager(folder.absolute()) as checkpoints:
        step = checkpoints.latest_step() or 0
        if step:
            saved = checkpoints.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore((params, state)),
                    loader=ocp.args.JsonRestore(),
                ),
            )
            params, state = saved.arrays
            loader.set_state(saved.loader)
            loader.batch_size = int(cabs_jax.batch_size(state))

        losses = []
        while step < steps:
            params, state, loss = train_step(params, state, next(loader))
            loader.batch_size = cabs_jax.batch_size(state)
            losses.append(float(loss))
            step += 1
            if step % EVERY == 0:
                checkpoints.save(
                    step,
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardSave((params, state)),
                        loader=ocp.args.JsonSave(loader.get_state()),
                    ),
                )
    return losses


if __name__ == "__main__":
    for loss in train(Path(sys.argv[1]), int(sys.argv[2])):
        print(loss)
