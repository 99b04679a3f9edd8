"""CABS on digits with flax linen: a `TrainState` that passes the moments to its transformation.

Run it with `python -m experiments.examples.flax_linen`.
"""

from typing import Any, Self

import jax
import optax
from flax import linen as nn
from flax.training import train_state
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import cabs_jax


class TrainState(train_state.TrainState):
    """Flax's own, whose `apply_gradients` has no place for extra arguments."""

    def apply_moments(self, moments: cabs_jax.GradientMoments) -> Self:
        """Makes a step."""
        updates, opt_state = self.tx.update(
            moments.mean,
            self.opt_state,
            self.params,
            moments=moments,
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


class Net(nn.Module):
    """A perceptron of one hidden layer."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """From (64,) to (10,)."""
        return nn.Dense(10)(nn.LayerNorm()(nn.relu(nn.Dense(32)(image))))


def main(steps: int = 200) -> tuple[list[float], list[int]]:
    """Trains, and returns the loss and the batch size of every step."""
    images, labels = load_digits(return_X_y=True)
    data = {"image": (images / 16).astype("float32"), "label": labels.astype("int32")}
    loader = cabs_jax.BatchLoader(data, batch_size=8)
    net = Net()
    state = TrainState.create(  # type: ignore[no-untyped-call]
        apply_fn=net.apply,
        params=net.init(jax.random.key(0), data["image"][0])["params"],
        tx=cabs_jax.cabs(0.5, min_batch_size=8, round_to=(8, 12, 16, 24, 32, 48, 64)),
    )

    @jax.jit
    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        def loss_fn(params: Any, example: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, example["image"])
            loss: jax.Array = cross_entropy(logits, example["label"])
            return loss

        moments = cabs_jax.gradient_moments(loss_fn)(state.params, batch)
        return state.apply_moments(moments), moments.value

    losses, sizes = [], []
    for _ in range(steps):
        sizes.append(int(loader.batch_size))
        state, loss = train_step(state, next(loader))
        loader.batch_size = cabs_jax.batch_size(state.opt_state)
        losses.append(float(loss))
    return losses, sizes


if __name__ == "__main__":
    for number, (loss, size) in enumerate(zip(*main(), strict=True), start=1):
        print(f"step {number:4d}  batch size {size:4d}  loss {loss:.4f}")
