"""CABS on digits, with nothing but JAX and Optax: a net written by hand.

Batches are padded to a few lengths, so that few executables serve all sizes; the next larger one is
compiled while training goes on. Run it with `python -m experiments.examples.plain_jax`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import cabs_jax

SIZES = cabs_jax.buckets(8, 64, count=4)


def loss_fn(params: Any, example: dict[str, jax.Array]) -> jax.Array:
    """Cross entropy of one example: no batch axis anywhere."""
    hidden = jax.nn.relu(example["image"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    loss: jax.Array = cross_entropy(logits, example["label"])
    return loss


def main(steps: int = 200) -> tuple[list[float], list[int]]:
    """Trains, and returns the loss and the batch size of every step."""
    images, labels = load_digits(return_X_y=True)
    data = {"image": (images / 16).astype("float32"), "label": labels.astype("int32")}
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(keys[1], (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }
    optimizer = cabs_jax.cabs(learning_rate=0.5, min_batch_size=8, max_batch_size=64)
    state = optimizer.init(params)
    moments_of = cabs_jax.gradient_moments(loss_fn)

    def step(params: Any, state: Any, batch: Any, mask: jax.Array) -> tuple[Any, Any, jax.Array]:
        m = moments_of(params, batch, mask)
        updates, state = optimizer.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state, m.value

    losses, sizes = [], []
    with (
        cabs_jax.BatchLoader(data, batch_size=8, pad_to=SIZES) as loader,
        cabs_jax.CompiledStep(step, SIZES, batch_argnums=(2, 3)) as train_step,
    ):
        for _ in range(steps):
            sizes.append(int(loader.batch_size))
            params, state, loss = train_step(params, state, *next(loader))
            loader.batch_size = cabs_jax.batch_size(state)
            losses.append(float(loss))
    return losses, sizes


if __name__ == "__main__":
    for number, (loss, size) in enumerate(zip(*main(), strict=True), start=1):
        print(f"step {number:4d}  batch size {size:4d}  loss {loss:.4f}")
