"""CABS on digits with flax nnx: its modules, and its optimizer, which passes the moments on.

Run it with `python -m experiments.examples.flax_nnx`.
"""

from typing import Any

import jax
from flax import nnx
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import cabs_jax


class Net(nnx.Module):
    """A small convolutional net. Its norm sees one example at a time, as it must."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From (batch, 8, 8, 1) to (batch, 10)."""
        features = nnx.relu(self.norm(self.conv(images)))
        return self.out(features.reshape(len(features), -1))


def main(steps: int = 200) -> tuple[list[float], list[int]]:
    """Trains, and returns the loss and the batch size of every step."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    loader = cabs_jax.BatchLoader((images, labels.astype("int32")), batch_size=8)

    model = Net(nnx.Rngs(0))
    transformation = cabs_jax.cabs(0.5, min_batch_size=8, round_to=(8, 12, 16, 24, 32, 48, 64))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Net, optimizer: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        def loss_fn(model: Net, batch_of_one: Any) -> jax.Array:
            image, label = batch_of_one
            loss: jax.Array = cross_entropy(model(image), label)[0]
            return loss

        m = cabs_jax.gradient_moments(loss_fn, keep_batch_dim=True)(model, batch)
        optimizer.update(model, m.mean, moments=m)
        return m.value, cabs_jax.batch_size(optimizer.opt_state)[...]  # out of its nnx.Variable

    losses, sizes = [], []
    for _ in range(steps):
        sizes.append(int(loader.batch_size))
        loss, loader.batch_size = train_step(model, optimizer, next(loader))
        losses.append(float(loss))
    return losses, sizes


if __name__ == "__main__":
    for number, (loss, size) in enumerate(zip(*main(), strict=True), start=1):
        print(f"step {number:4d}  batch size {size:4d}  loss {loss:.4f}")
