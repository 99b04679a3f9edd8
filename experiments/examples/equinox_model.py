"""CABS on digits with Equinox: the floating-point arrays of the model are the parameters.

Run it with `python -m experiments.examples.equinox_model`, after `pip install equinox`.
"""

from typing import Any

import equinox as eqx
import jax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import cabs_jax


def main(steps: int = 200) -> tuple[list[float], list[int]]:
    """Trains, and returns the loss and the batch size of every step."""
    images, labels = load_digits(return_X_y=True)
    data = {"image": (images / 16).astype("float32"), "label": labels.astype("int32")}
    loader = cabs_jax.BatchLoader(data, batch_size=8)

    model = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(0))
    optimizer = cabs_jax.cabs(0.5, min_batch_size=8, round_to=(8, 12, 16, 24, 32, 48, 64))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_fn(model: eqx.nn.MLP, example: dict[str, jax.Array]) -> jax.Array:
        loss: jax.Array = cross_entropy(model(example["image"]), example["label"])
        return loss

    @eqx.filter_jit
    def train_step(model: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        m = cabs_jax.gradient_moments(loss_fn)(model, batch)
        updates, state = optimizer.update(m.mean, state, model, moments=m)
        return eqx.apply_updates(model, updates), state, m.value

    losses, sizes = [], []
    for _ in range(steps):
        sizes.append(int(loader.batch_size))
        model, state, loss = train_step(model, state, next(loader))
        loader.batch_size = cabs_jax.batch_size(state)
        losses.append(float(loss))
    return losses, sizes


if __name__ == "__main__":
    for number, (loss, size) in enumerate(zip(*main(), strict=True), start=1):
        print(f"step {number:4d}  batch size {size:4d}  loss {loss:.4f}")
