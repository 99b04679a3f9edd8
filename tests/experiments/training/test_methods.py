import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from experiments import datasets
from experiments.training import methods
from experiments.training.config import RunConfig
from experiments.training.step import make_train_step

PARAMS = {"w": jnp.ones(3)}
GRADS = {"w": jnp.full(3, 2.0)}
SCALES_THE_STEP = ["noise_scale", *(name for name in methods.METHODS if name.endswith("_adam"))]


def update(config, *, value=1.0, variance=0.0, state=None):
    optimizer = methods.build(config)
    state = optimizer.init(PARAMS) if state is None else state
    moments = cabs_jax.GradientMoments(
        jnp.float32(value), GRADS, jnp.float32(variance), cabs_jax.batch_size(state)
    )
    return optimizer.update(GRADS, state, PARAMS, moments=moments)


def rates_and_sizes(config, steps):
    """What each step used, noise and gradient staying the same."""
    rates, sizes, state = [], [], methods.build(config).init(PARAMS)
    step = jax.jit(lambda state: update(config, state=state)[1])
    for _ in range(steps):
        sizes.append(int(cabs_jax.batch_size(state)))
        state = step(state)
        rates.append(float(methods.learning_rate(state)))
    return rates, sizes


@pytest.mark.parametrize("method", sorted(set(methods.METHODS) - set(SCALES_THE_STEP)))
def test_every_method_takes_a_step_of_sgd_and_keeps_within_its_bounds(method):
    config = RunConfig(method=method, learning_rate=0.5, theta=0.9)
    updates, state = update(config, variance=1e6)
    assert updates["w"].tolist() == [-1.0, -1.0, -1.0]
    assert methods.learning_rate(state) == 0.5
    smallest, largest = methods.bounds(config)
    assert smallest <= cabs_jax.batch_size(state) <= largest


QUICK = ("cabs", "cabs_adam", "constant", "noise_scale")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in sorted(methods.METHODS)],
)
def test_every_method_learns_the_digits(method):
    config = RunConfig(
        method=method, learning_rate=0.2, theta=0.9, max_batch_size=64, examples=4_000
    )
    digits = datasets.load("digits").train
    data = {"x": digits["input"].reshape(-1, 64) / np.float32(16), "label": digits["label"]}

    def loss(params, example):
        logits = example["x"] @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    params = {"b": jnp.zeros(10), "w": jnp.zeros((64, 10))}
    optimizer = methods.build(config)
    state = optimizer.init(params)
    step = jax.jit(make_train_step(loss, optimizer, methods.variance(config)))
    seen, losses = 0, []
    with cabs_jax.BatchLoader(data, config.batch_size, pad_to=64) as loader:
        while seen < config.examples:
            batch, mask = next(loader)
            params, state, info = step(params, state, batch, mask)
            loader.batch_size = int(info.next_batch_size)
            seen += int(mask.sum())
            losses.append(float(info.loss))
    assert losses[0] == pytest.approx(np.log(10), rel=1e-5)
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    assert step._cache_size() == 1


def test_noise_scale_shortens_the_step_of_batches_below_it():
    config = RunConfig(method="noise_scale", learning_rate=0.5)
    updates, state = update(config, variance=90.0)
    noise_scale = 90 / (12 - 90 / 15)
    assert float(methods.learning_rate(state)) == pytest.approx(0.5 / (1 + noise_scale / 16))
    np.testing.assert_allclose(updates["w"], -2 * methods.learning_rate(state), rtol=1e-6)
    assert cabs_jax.batch_size(state) == 16  # the noise scale is 15
    _, state = update(config, variance=1e6)
    assert methods.learning_rate(state) == 0.0
    assert cabs_jax.batch_size(state) == 2048


def test_big_batch_judges_each_batch_alone_and_grows_by_a_tenth():
    config = RunConfig(method="big_batch", batch_size=100, max_batch_size=112)
    _, state = update(config, variance=12.1 * 99)
    assert cabs_jax.batch_size(state) == 110
    _, state = update(config, state=state, variance=11.9 * 109)
    assert cabs_jax.batch_size(state) == 110
    _, state = update(config, state=state, variance=12.1 * 109)
    assert cabs_jax.batch_size(state) == 112


def test_big_batch_reaches_the_next_bucket():
    config = RunConfig(method="big_batch", round_to="buckets")
    state, sizes = None, [16]
    for _ in range(3):
        _, state = update(config, variance=1e6, state=state)
        sizes.append(int(cabs_jax.batch_size(state)))
    assert tuple(sizes) == methods.legal_sizes(config)[:4]


@pytest.mark.slow
def test_geometric_growth_grows_where_step_decay_divides_the_learning_rate():
    config = RunConfig(method="geometric_growth", batch_size=16, examples=1_001)
    rates, sizes = rates_and_sizes(config, steps=35)
    assert set(rates) == {np.float32(0.1)}
    assert sizes == 32 * [16] + 2 * [160] + [1600]  # 32 · 16 ≥ 500.5, 512 + 2 · 160 ≥ 750.75

    constant = RunConfig(method="constant", schedule="step", batch_size=16, examples=1_001)
    rates, sizes = rates_and_sizes(constant, steps=62)
    np.testing.assert_allclose(rates, 32 * [0.1] + 15 * [0.01] + 15 * [0.001], rtol=1e-6)
    assert set(sizes) == {16}


def test_cosine_falls_to_zero_over_the_examples():
    config = RunConfig(method="constant", schedule="cosine", batch_size=100, examples=400)
    rates, _ = rates_and_sizes(config, steps=6)
    expected = [0.1, 0.05 * (1 + 0.5**0.5), 0.05, 0.05 * (1 - 0.5**0.5), 0.0, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-8)


def test_momentum_multiplies_the_size_that_cabs_asks_for():
    options = {"learning_rate": 0.1, "min_batch_size": 10, "batch_size": 10}
    _, plain = update(RunConfig(method="cabs", **options), variance=4_000.0)
    _, state = update(RunConfig(method="cabs_momentum", momentum=0.8, **options), variance=4_000.0)
    assert cabs_jax.batch_size(plain) == 20
    assert cabs_jax.batch_size(state) == 100


def test_adam_couples_to_its_second_moment():
    config = RunConfig(method="cabs_adam", learning_rate=0.5, max_batch_size=100)
    optimizer, diagonal = methods.build(config), {"w": jnp.array([100.0, 600.0, 1_700.0])}
    state = optimizer.init(PARAMS)
    for size in (16, 30):  # from the second step on: 0.05 · 0.5 · 2400 / |2|
        moments = cabs_jax.GradientMoments(jnp.float32(1), GRADS, diagonal, jnp.int32(16))
        updates, state = optimizer.update(GRADS, state, PARAMS, moments=moments)
        assert cabs_jax.batch_size(state) == size
        np.testing.assert_allclose(updates["w"], -0.5, rtol=1e-5)
        assert methods.learning_rate(state) == 0.5


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("constant", optax.sgd(0.1)),
        ("constant_momentum", optax.sgd(0.1, momentum=0.8)),
        ("constant_adam", optax.adam(0.1)),
    ],
)
def test_methods_of_constant_size_are_those_of_optax(method, optimizer):
    config = RunConfig(method=method, momentum=0.8, schedule="constant")
    state, expected_state = methods.build(config).init(PARAMS), optimizer.init(PARAMS)
    for _ in range(3):
        updates, state = update(config, state=state)
        expected, expected_state = optimizer.update(GRADS, expected_state, PARAMS)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


@pytest.mark.slow  # compiles every schedule
def test_schedules_obey_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for schedule in ("step", "cosine"):
            update(RunConfig(method="constant", schedule=schedule))
        update(RunConfig(method="noise_scale"), variance=1.0)


def test_adaptive_methods_start_at_the_given_size():
    config = RunConfig(batch_size=100)
    assert cabs_jax.batch_size(methods.build(config).init(PARAMS)) == 100


def test_constant_keeps_its_size_whatever_the_bounds():
    _, state = update(RunConfig(method="constant", batch_size=7), variance=1e6)
    assert cabs_jax.batch_size(state) == 7


def test_buckets_are_the_only_legal_sizes_when_asked_for():
    _, state = update(RunConfig(round_to="buckets"), variance=9e3)
    assert int(cabs_jax.batch_size(state)) in methods.legal_sizes(RunConfig())
    _, state = update(RunConfig(round_to=10, min_batch_size=10, max_batch_size=2000), variance=9e3)
    assert int(cabs_jax.batch_size(state)) % 10 == 0


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'sgd'; known methods: .*cabs, cabs_adam"):
        methods.build(RunConfig(method="sgd"))


def test_the_learning_rate_of_the_state_is_that_of_the_last_update():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    state = optimizer.init(jnp.zeros(2))
    rates = []
    for _ in range(3):
        _, state = optimizer.update(jnp.ones(2), state)
        rates.append(float(methods.learning_rate(state)))
    assert rates == pytest.approx([1.0, 0.1, 0.1])


@pytest.mark.slow
def test_rising_sizes_with_adam_take_rates_that_go_with_them():
    seen = {"learning_rate": 0.5, "batch_size": 16, "max_batch_size": 64, "examples": 640}
    rates, sizes = rates_and_sizes(RunConfig(method="ramp_adam", **seen), 16)
    assert sizes == [16] * 10 + [32] * 5 + [64]  # from 160 and from 320 examples on
    np.testing.assert_allclose(rates, [0.5 * (m / 16) ** 0.5 for m in sizes], rtol=1e-6)
    rates, sizes = rates_and_sizes(RunConfig(method="seesaw_adam", **seen), 20)
    assert sizes[0] == 16
    assert sizes[-1] > 32
    assert sizes == sorted(sizes)
    np.testing.assert_allclose(rates, [0.5 * (16 / m) ** 0.5 for m in sizes], rtol=1e-6)


@pytest.mark.parametrize("method", ["constant_adam", "cabs_adam", "ramp_adam"])
def test_weight_decay_of_adam_is_that_of_adamw(method):
    optimizer = methods.build(RunConfig(method=method, learning_rate=0.5, weight_decay=0.1))
    diagonal = {"w": jnp.zeros(3)} if method == "cabs_adam" else jnp.float32(0)
    moments = cabs_jax.GradientMoments(jnp.float32(1), GRADS, diagonal, jnp.int32(16))
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, moments=moments)
    adamw = optax.adamw(0.5, weight_decay=0.1)
    expected, _ = adamw.update(GRADS, adamw.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


@pytest.mark.parametrize("method", ["cabs", *sorted(methods.RATES)])
def test_the_next_learning_rate_is_that_for_the_size_which_is_asked_for(method):
    config = RunConfig(method=method, batch_size=16, examples=96, averages=True)
    # What the noise scale is thought to be changes a little with every step.
    tolerance = 0.2 if method == "noise_scale" else 1e-6
    _, state = update(config, variance=110.0)
    rates = set()
    for _ in range(8):
        foretold = methods.next_learning_rate(config, state)
        _, state = update(config, variance=110.0, state=state)
        assert float(methods.learning_rate(state)) == pytest.approx(foretold, rel=tolerance)
        rates.add(foretold)
    assert (len(rates) > 1) == (method != "cabs")
