"""Mean loss and accuracy over a split, in fixed-size batches that compile once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Evaluation(NamedTuple):
    """Means over a split: cross entropy in nats, and the fraction of labels found."""

    loss: float
    accuracy: float


def make_evaluate(
    predict: Callable[[Any, jax.Array], jax.Array], batch_size: int = 500
) -> Callable[[Any, Mapping[str, np.ndarray]], Evaluation]:
    """`evaluate(params, split) -> Evaluation`, the split's last batch padded and masked.

    Args:
      predict: Maps (params, inputs (m, ...)) to logits (m, classes), or (m, length, classes).
      batch_size: Examples in one compiled call.
    """

    @jax.jit
    def totals(params: Any, batch: Any, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        def total(values: jax.Array) -> jax.Array:
            return jnp.sum(values.reshape(len(values), -1).mean(1), where=mask)

        logits = predict(params, batch["input"]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return total(losses), total(correct)

    def evaluate(params: Any, split: Mapping[str, np.ndarray]) -> Evaluation:
        total_loss, total_correct, count = 0.0, 0.0, len(split["label"])
        size = min(batch_size, count)
        for start in range(0, count, size):
            batch = {name: array[start : start + size] for name, array in split.items()}
            loss, correct = totals(params, *_padded(batch, size))
            total_loss += float(loss)
            total_correct += float(correct)
        return Evaluation(total_loss / count, total_correct / count)

    return evaluate


def _padded(batch: Mapping[str, np.ndarray], size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Zeros after the examples, up to `size`, and the mask (size,) of the examples."""
    count = len(batch["label"])
    padded = {
        name: np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
        for name, array in batch.items()
    }
    return padded, np.arange(size) < count
