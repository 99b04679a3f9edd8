"""The nets: sizes, initialisation and preprocessing as published, pure in one image or a batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs_jax
from experiments import datasets
from experiments.training import models

SHAPES = {
    "mnist_2c2d": (28, 28, 1),
    "cifar10_2c3d": (32, 32, 3),
    "3c3d": (32, 32, 3),
    "digits_mlp": (8, 8, 1),
    "small_cnn": (8, 8, 1),
}
LARGE = ("cifar10_2c3d", "3c3d")
all_models = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in SHAPES],
)


@functools.cache
def small(name: str) -> models.Model:
    return models.build(name, SHAPES[name], 10, width=0.1)


def parameter_shapes(*args, **options):
    return jax.eval_shape(lambda: models.build(*args, **options).params)


def logits_shape(name: str, shape: tuple[int, int, int], num_classes: int) -> tuple[int, ...]:
    def initial_logits(image):
        model = models.build(name, shape, num_classes, width=0.05)
        return model.apply(model.params, image)

    return jax.eval_shape(initial_logits, jax.ShapeDtypeStruct(shape, jnp.uint8)).shape


def some_images(n: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("mnist_2c2d", 10, 3_274_634),
        ("cifar10_2c3d", 10, 1_068_298),
        ("3c3d", 10, 895_210),
        ("3c3d", 100, 918_340),
        ("digits_mlp", 10, 64 * 48 + 48 + 48 * 24 + 24 + 24 * 10 + 10),
        ("small_cnn", 10, 80 + 1_168 + 4 * 16 * 10 + 10),
    ],
)
def test_nets_have_their_published_number_of_parameters(name, num_classes, count):
    params = parameter_shapes(name, SHAPES[name], num_classes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.slow
@all_models
def test_one_image_and_a_batch_give_the_same_logits(name):
    model, images = small(name), some_images(3, SHAPES[name])
    batched, single = jax.jit(
        lambda params, images: (model.predict(params, images), model.apply(params, images[1]))
    )(model.params, images)
    assert batched.shape == (3, 10)
    np.testing.assert_allclose(single, batched[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@all_models
def test_loss_is_a_cross_entropy_with_a_gradient_in_every_layer(name):
    model, images = small(name), some_images(3, SHAPES[name])
    batch = {"input": images, "label": np.array([0, 7, 9], np.int32)}

    @jax.jit
    def evaluate(params, batch):
        per_example = jax.vmap(jax.value_and_grad(model.loss), (None, 0))
        return per_example(params, batch), model.predict(params, batch["input"])

    with jax.numpy_dtype_promotion("strict"):
        (losses, grads), logits = evaluate(model.params, batch)
    assert losses.dtype == jnp.float32
    logits = np.asarray(logits, np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[[0, 1, 2], batch["label"]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 0


def test_the_same_seed_gives_the_same_parameters_and_another_seed_others():
    first, again, other = (
        models.build("digits_mlp", (8, 8, 1), 10, seed=seed).params for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first["dense1"]["kernel"], again["dense1"]["kernel"])
    assert not np.allclose(first["dense1"]["kernel"], other["dense1"]["kernel"])


@pytest.mark.slow
def test_initialisers_draw_the_numbers_of_jax():
    key, shape = jax.random.key(3), (3, 5, 7)
    for ours, reference in (
        (models.truncated_normal(0.3), jax.nn.initializers.truncated_normal(0.3)),
        (models.xavier_normal, jax.nn.initializers.xavier_normal()),
    ):
        np.testing.assert_allclose(ours(key, shape), reference(key, shape), rtol=1e-5)


def assert_truncated_normal(kernel: jax.Array, sigma: float) -> None:
    """Normal of this sigma, cut at two sigma: the variance left is 0.774 sigma squared."""
    assert np.abs(kernel).max() <= 2 * sigma * (1 + 1e-6)
    error = 4 / math.sqrt(2 * kernel.size)
    np.testing.assert_allclose(np.std(kernel), 0.8796 * sigma, rtol=error)


@pytest.mark.slow
def test_mnist_2c2d_starts_as_the_authors_net():
    params = models.build("mnist_2c2d", (28, 28, 1), 10).params
    for layer in params.values():
        assert_truncated_normal(layer["kernel"], 0.01)
        np.testing.assert_array_equal(layer["bias"], np.float32(0.05))


@pytest.mark.slow  # draws a million parameters
def test_cifar10_2c3d_starts_as_the_authors_net():
    params = models.build("cifar10_2c3d", (32, 32, 3), 10).params
    expected = {
        "conv1": (0.05, 0.0),
        "conv2": (0.05, 0.1),
        "dense1": (0.04, 0.1),
        "dense2": (0.04, 0.1),
        "dense3": (1 / 192, 0.0),
    }
    assert params.keys() == expected.keys()
    for name, (sigma, bias) in expected.items():
        assert_truncated_normal(params[name]["kernel"], sigma)
        np.testing.assert_array_equal(params[name]["bias"], np.float32(bias))


@pytest.mark.slow  # draws millions of parameters
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist_2c2d", {"conv1": 0.01, "conv2": 0.02, "dense1": 0.02, "dense2": 0.02}),
        (
            "cifar10_2c3d",
            {"conv1": 0.05, "conv2": 0.1, "dense1": 0.08, "dense2": 0.08, "dense3": 2 / 192},
        ),
    ],
)
def test_narrow_nets_start_with_larger_weights_where_they_have_fewer_inputs(name, expected):
    params = models.build(name, SHAPES[name], 10, width=0.25).params
    assert params.keys() == expected.keys()
    for layer, sigma in expected.items():
        assert_truncated_normal(params[layer]["kernel"], sigma)


@pytest.mark.slow
def test_cifar10_2c3d_sees_only_the_centre_and_no_brightness_or_contrast():
    model, image = small("cifar10_2c3d"), some_images(1, (32, 32, 3))[0] // 4
    apply = functools.partial(jax.jit(model.apply), model.params)
    logits = apply(image)
    border = image.copy()
    border[:4], border[28:], border[:, :4], border[:, 28:] = 0, 255, 9, 99
    np.testing.assert_array_equal(apply(border), logits)
    brighter = image * 3 + 20
    np.testing.assert_allclose(apply(brighter), logits, rtol=1e-4, atol=1e-5)
    inside = image.copy()
    inside[4, 4] = 255 - inside[4, 4]
    assert not np.allclose(apply(inside), logits)


def test_standardised_images_have_zero_mean_and_unit_variance():
    images = some_images(3, (24, 24, 3))
    expected = images.astype(np.float64)
    expected -= expected.mean((1, 2, 3), keepdims=True)
    expected /= expected.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(models.standardize(images), expected, atol=1e-4)


def test_a_constant_or_nearly_constant_image_is_not_blown_up():
    image = np.full((1, 4, 4, 1), 200, np.uint8)
    np.testing.assert_array_equal(models.standardize(image), 0)
    faint = np.full((1, 4, 4, 1), 1e-3, np.float32) * np.arange(16).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(
        models.standardize(faint.astype(np.float32)), (faint - faint.mean()) * 4, rtol=1e-4
    )


def test_mnist_2c2d_pools_odd_sizes_as_same_padding_does():
    params = parameter_shapes("mnist_2c2d", (13, 9, 1), 3, width=0.5)
    assert params["dense1"]["kernel"].shape == (4 * 3 * 32, 512)
    assert logits_shape("mnist_2c2d", (13, 9, 1), 3) == (3,)


@pytest.mark.parametrize("shape", [(9, 9, 3), (10, 33, 1), (31, 64, 3)])
def test_3c3d_takes_images_of_other_sizes(shape):
    assert logits_shape("3c3d", shape, 4) == (4,)


@pytest.mark.slow  # trains
@pytest.mark.parametrize(("name", "rate"), [("digits_mlp", 0.3), ("small_cnn", 0.3)])
def test_small_nets_learn_the_digits(name, rate):
    train = datasets.load("digits").train
    model = models.build(name, (8, 8, 1), 10)
    batch_loss = jax.vmap(model.loss, (None, 0))

    @jax.jit
    def step(params, batch):
        value, grads = jax.value_and_grad(lambda params: batch_loss(params, batch).mean())(params)
        return jax.tree.map(lambda leaf, grad: leaf - rate * grad, params, grads), value

    params, values = model.params, []
    for start in range(0, 1408, 64):
        batch = {key: array[start : start + 64] for key, array in train.items()}
        params, value = step(params, batch)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "lenet"}, "unknown model 'lenet': choose one of mnist_2c2d, cifar10_2c3d"),
        ({"input_shape": (28, 28)}, r"must have a shape .* got \(28, 28\)"),
        ({"input_shape": (28, 0, 1)}, r"must have a shape .* got \(28, 0, 1\)"),
        ({"num_classes": 0}, "num_classes must be positive, got 0"),
        ({"width": 0.0}, "width must be positive and finite, got 0.0"),
        ({"width": math.nan}, "width must be positive and finite, got nan"),
        ({"name": "cifar10_2c3d", "input_shape": (23, 32, 3)}, "at least 24x24 pixels"),
        ({"name": "3c3d", "input_shape": (8, 8, 3)}, "at least 9x9 pixels"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(change, message):
    arguments = {"name": "mnist_2c2d", "input_shape": (28, 28, 1), "num_classes": 10}
    with pytest.raises(ValueError, match=message):
        models.build(**(arguments | change))


def small_decoder():
    return models.build("decoder", (6,), 256, width=0.05)


@pytest.mark.slow
def test_the_decoder_has_five_million_parameters_and_starts_knowing_nothing():
    params = parameter_shapes("decoder", (128,), 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_837_376
    model, example = small_decoder(), {"input": np.arange(6, dtype=np.uint8), "label": np.arange(6)}
    assert model.loss(model.params, example) == pytest.approx(math.log(256), rel=0.05)


@pytest.mark.slow
def test_the_decoder_sees_no_byte_that_comes_later():
    model, sequence = small_decoder(), some_images(1, (6,))[0]
    changed = sequence.copy()
    changed[4] ^= 1
    before, after = (model.apply(model.params, text) for text in (sequence, changed))
    np.testing.assert_allclose(before[:4], after[:4], rtol=1e-5, atol=1e-6)
    assert (np.abs(before[4:] - after[4:]).max(1) > 1e-4).all()


@pytest.mark.exhaustive  # the zoo has nets of its parts
def test_the_moments_of_the_decoder_are_those_of_its_per_example_gradients():
    model, inputs = small_decoder(), some_images(5, (6,))
    batch = {"input": inputs, "label": np.roll(inputs, -1, 1).astype(np.int32)}
    found = jax.jit(cabs_jax.gradient_moments(model.loss))(model.params, batch)
    gradients = jax.jit(jax.vmap(jax.grad(model.loss), (None, 0)))(model.params, batch)
    flat = [np.asarray(g, np.float64).reshape(5, -1) for g in jax.tree.leaves(gradients)]
    np.testing.assert_allclose(found.variance, sum(g.var(0).sum() for g in flat), rtol=1e-4)
