"""Batches from a Grain `MapDataset`, sized by the norm test.

Data sets of Hugging Face and torch go in the same place.

The data set keeps to reading and decoding records. Shuffling, epochs and batches of changing size
are the loader's, which reads ahead in a thread. Run it with
`python -m experiments.examples.grain_dataset`.
"""

from typing import Any, SupportsIndex

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import cabs_jax


class Records:
    """Anything with `__len__` and `__getitem__` is a source for Grain, and for `BatchLoader`."""

    def __init__(self) -> None:
        self.images, self.labels = load_digits(return_X_y=True)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return {"image": self.images[index], "label": np.int32(self.labels[index])}


def decode(record: dict[str, Any]) -> dict[str, Any]:
    """Where images would be unpacked."""
    return {**record, "image": (record["image"] / 16).astype(np.float32)}


def main(steps: int = 200, dataset: Any = None) -> tuple[list[float], list[int]]:
    """Trains, and returns the loss and the batch size of every step."""
    if dataset is None:
        dataset = grain.MapDataset.source(Records()).map(decode)

    def loss_fn(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        logits = example["image"] @ params["w"] + params["b"]
        loss: jax.Array = cross_entropy(logits, example["label"])
        return loss

    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    optimizer = optax.chain(
        cabs_jax.adapt_batch_size(
            cabs_jax.rules.norm_test(theta=1.0), min_batch_size=8, round_to=(8, 16, 32, 64, 128)
        ),
        optax.sgd(0.1, momentum=0.9),
    )
    state = optimizer.init(params)

    @jax.jit
    def train_step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        m = cabs_jax.gradient_moments(loss_fn)(params, batch)
        updates, state = optimizer.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state, m.value

    losses, sizes = [], []
    with cabs_jax.BatchLoader(dataset, batch_size=8) as loader:
        for _ in range(steps):
            sizes.append(int(loader.batch_size))
            params, state, loss = train_step(params, state, next(loader))
            loader.batch_size = cabs_jax.batch_size(state)
            losses.append(float(loss))
    return losses, sizes


if __name__ == "__main__":
    for number, (loss, size) in enumerate(zip(*main(), strict=True), start=1):
        print(f"step {number:4d}  batch size {size:4d}  loss {loss:.4f}")
