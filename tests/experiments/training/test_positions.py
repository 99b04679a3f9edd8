import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.training import models
from experiments.training.positions import squares_over_positions

SHAPE = (6, 6, 1)


def batch_of(shape, size=3):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 17, (size, *shape), dtype=np.uint8)
    return {"input": jnp.asarray(image), "label": jnp.arange(size)}


def per_example_gradients(model, batch):
    return jax.jit(jax.vmap(jax.grad(model.loss), (None, 0)))(model.params, batch)


@pytest.mark.slow
def test_of_dense_layers_the_squares_are_those_of_the_gradients():
    model = models.build("digits_mlp", SHAPE, 4, width=0.2)
    batch = batch_of(SHAPE)
    squares = squares_over_positions("digits_mlp", SHAPE, 4, width=0.2)(model.params, batch)
    gradients = jax.tree.leaves(per_example_gradients(model, batch))
    exact = sum(np.sum(np.square(np.asarray(g, np.float64))) for g in gradients) / 3
    assert float(squares) == pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
def test_of_convolutions_each_position_is_squared_alone():
    model = models.build("small_cnn", SHAPE, 4, width=0.25)
    batch = batch_of(SHAPE)
    found = squares_over_positions("small_cnn", SHAPE, 4, width=0.25)(model.params, batch)

    def loss(shifts, params, image, label):
        """The loss with numbers added to what the convolutions give, at every position."""

        def shifted(layer, inputs):
            outputs = layer(inputs)
            index = "conv2" if outputs.shape[1] == 3 else "conv1"
            if outputs.ndim == 2:
                return outputs
            seen[index] = inputs
            return outputs + shifts[index]

        net = models.build("small_cnn", SHAPE, 4, width=0.25, call_layer=shifted)
        return net.loss(params, {"input": image, "label": label}), dict(seen)

    seen = {}
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    dense_gradient = jax.jit(jax.grad(model.loss))
    zeros = {"conv1": jnp.zeros((1, 6, 6, 2)), "conv2": jnp.zeros((1, 3, 3, 4))}
    total = 0.0
    for image, label in zip(batch["input"], batch["label"], strict=True):
        cotangents, inputs = gradient(zeros, model.params, image, label)
        for name, delta in cotangents.items():
            delta = np.asarray(delta[0], np.float64)
            padded = np.pad(np.asarray(inputs[name][0], np.float64), ((1, 1), (1, 1), (0, 0)))
            for row, column in np.ndindex(delta.shape[:2]):
                patch = padded[row : row + 3, column : column + 3]
                total += np.sum(patch**2) * np.sum(delta[row, column] ** 2)  # the kernel's
                total += np.sum(delta[row, column] ** 2)  # the bias's
        dense = dense_gradient(model.params, {"input": image, "label": label})["dense"]
        total += sum(np.sum(np.square(np.asarray(g, np.float64))) for g in dense.values())
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.slow
def test_both_variances_are_measured_along_a_run(tmp_path):
    command = ["variances", "--dataset", "digits", "--steps", "3", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    lines = (tmp_path / "out" / "variances.jsonl").read_text().splitlines()
    assert [json.loads(line)["examples"] for line in lines] == [16, 32, 48]
    for line in map(json.loads, lines):  # the net has no convolution
        assert line["over_positions"] == pytest.approx(line["exact"], rel=1e-3)
    assert (tmp_path / "out" / "variances.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(command) == 2  # never into results that are there
