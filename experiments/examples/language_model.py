"""A small decoder language model with AdamW, on the source of the standard library of Python.

The batch size follows the noise scale: the number of sequences at which the noise of the gradient
is as large as the gradient. Embeddings are tied and the layers scanned; no gradient of a single
sequence is held. Run it with `python -m experiments.examples.language_model`: it draws
noise_scale.png.
"""

import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import cabs_jax

CONTEXT, WIDTH, HEADS, LAYERS, BYTES = 32, 64, 4, 2, 256


class Step(NamedTuple):
    """What a step measured."""

    loss: float
    noise_scale: float
    batch_size: int


def read_sequences(count: int = 20_000) -> Any:
    """Bytes of source code, uint8 of shape (count, CONTEXT + 1)."""
    text, length = bytearray(), count * (CONTEXT + 1)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_bytes()
    return np.frombuffer(text, np.uint8)[:length].reshape(-1, CONTEXT + 1)


def init(key: jax.Array) -> Any:
    """Float32 parameters; those of the layers have a leading axis of length LAYERS."""
    keys = iter(jax.random.split(key, 6))

    def matrix(*shape: int) -> jax.Array:
        drawn: jax.Array = jax.random.normal(next(keys), shape) / shape[-2] ** 0.5
        return drawn

    layers = {
        "qkv": matrix(LAYERS, WIDTH, 3 * WIDTH),
        "out": matrix(LAYERS, WIDTH, WIDTH),
        "up": matrix(LAYERS, WIDTH, 4 * WIDTH),
        "down": matrix(LAYERS, 4 * WIDTH, WIDTH),
    }
    return {"bytes": matrix(BYTES, WIDTH), "places": matrix(CONTEXT, WIDTH), "layers": layers}


def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
    """Cross entropy, in nats a byte, of one sequence of shape (CONTEXT + 1,)."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        parts = (jax.nn.standardize(x) @ p["qkv"]).reshape(CONTEXT, 3, HEADS, WIDTH // HEADS)
        q, k, v = parts[:, 0], parts[:, 1], parts[:, 2]
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(CONTEXT, WIDTH) @ p["out"]
        return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"], None

    tokens = sequence.astype(jnp.int32)
    x, _ = lax.scan(layer, params["bytes"][tokens[:-1]] + params["places"], params["layers"])
    logits = jax.nn.standardize(x) @ params["bytes"].T
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()
    return loss


def main(steps: int = 600, sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256)) -> list[Step]:
    """Trains, with as many compilations as `sizes` at most."""
    optimizer = optax.chain(
        cabs_jax.adapt_batch_size(
            cabs_jax.rules.noise_scale(),
            min_batch_size=sizes[0],
            max_batch_size=sizes[-1],
            round_to=sizes,
            debias=True,
        ),
        optax.adamw(2e-3),
    )
    params = init(jax.random.key(0))
    state = optimizer.init(params)
    moments_of = cabs_jax.gradient_moments(loss_fn)

    @jax.jit
    def train_step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        m = moments_of(params, batch)
        updates, state = optimizer.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state, m.value

    history = []
    with cabs_jax.BatchLoader(read_sequences(), batch_size=sizes[0]) as loader:
        for _ in range(steps):
            size = int(loader.batch_size)
            params, state, loss = train_step(params, state, next(loader))
            loader.batch_size = cabs_jax.batch_size(state)
            noise_scale = optax.tree.get(state, "raw_batch_size")
            history.append(Step(float(loss), float(noise_scale), size))
    return history


def plot(history: list[Step], path: str) -> None:
    """Draws loss, noise scale and batch size against the examples seen."""
    from matplotlib.figure import Figure

    losses, noise_scales, sizes = map(np.asarray, zip(*history, strict=True))
    examples = np.cumsum(sizes)
    figure = Figure(figsize=(6, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(examples, losses)
    above.set_ylabel("loss [nats/byte]")
    below.plot(examples, np.where(np.isfinite(noise_scales), noise_scales, np.nan))
    below.step(examples, sizes, where="pre")
    below.set(xlabel="sequences seen", ylabel="sequences", yscale="log")
    below.legend(["noise scale ξ/‖∇F‖²", "batch size"])
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    history = main()
    print(f"loss {history[0].loss:.2f} -> {history[-1].loss:.2f} nats/byte; noise_scale.png")
    plot(history, "noise_scale.png")
