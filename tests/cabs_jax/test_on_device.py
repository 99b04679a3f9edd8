import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax

RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(300, 5)).astype(np.float32)
DATA = {"x": INPUTS, "y": INPUTS.sum(1) + RANDOM.normal(size=300).astype(np.float32)}
PARAMS = {"w": jnp.zeros(5), "b": jnp.zeros(())}
OPTIMIZER = cabs_jax.cabs(0.2, scale=40.0, min_batch_size=4, max_batch_size=100)


def loss_fn(params, example):
    return 0.5 * jnp.square(params["w"] @ example["x"] + params["b"] - example["y"])


def on_device(**options):
    return jax.jit(
        cabs_jax.on_device_loop(loss_fn, OPTIMIZER, microbatch_size=8, max_steps=60, **options)
    )


def on_host(num_steps, **options):
    @jax.jit
    def step(params, state, batch, mask):
        m = cabs_jax.gradient_moments(loss_fn, microbatch_size=8)(params, batch, mask)
        updates, state = OPTIMIZER.update(
            m.mean, state, params, value=m.value, gradient_variance=m.variance, count=m.count
        )
        return optax.apply_updates(params, updates), state, (m.count, m.value, m.variance)

    loader = cabs_jax.BatchLoader(DATA, 4, pad_to=104, **options)
    params, state, metrics = PARAMS, OPTIMIZER.init(PARAMS), []
    for _ in range(num_steps):
        loader.batch_size = cabs_jax.batch_size(state)
        params, state, measured = step(params, state, *next(loader))
        metrics.append(measured)
    return (
        params,
        state,
        loader.get_state()["position"],
        jax.device_get([jnp.stack(column) for column in zip(*metrics, strict=True)]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"seed": 3}, {"shuffle": False}])
def test_sizes_losses_and_parameters_are_those_of_the_host_loop(options):
    params, state, position, (sizes, values, variances) = on_host(60, **options)
    result = on_device(**options)(PARAMS, OPTIMIZER.init(PARAMS), DATA, cabs_jax.Position(), 60)
    np.testing.assert_array_equal(result.metrics.batch_size, sizes)
    np.testing.assert_allclose(result.metrics.value, values, rtol=1e-5)
    np.testing.assert_allclose(result.metrics.gradient_variance, variances, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (result.params, result.opt_state),
        (params, state),
    )
    assert tuple(map(int, result.position)) == divmod(position, 300)
    assert len(np.unique(sizes)) > 5
    assert sum(sizes) > 900  # several epochs, and several windows of the order


KEY = jax.random.key(5)
WEIGHTS = RANDOM.integers(0, 4, 300)


def noisy_loss(params, example, rng):
    return loss_fn(params, example | {"x": example["x"] * jax.random.uniform(rng, (5,))})


@pytest.mark.slow
def test_keys_and_weights_are_those_of_the_host_loop():
    """Zero weights among them, which draw nothing, and a run in two pieces."""

    @jax.jit
    def step(params, state, batch, mask, rng):
        batch, weights = batch
        m = cabs_jax.gradient_moments(noisy_loss)(params, batch, mask, rng=rng, weights=weights)
        updates, state = OPTIMIZER.update(m.mean, state, params, moments=m)
        return optax.apply_updates(params, updates), state

    loader = cabs_jax.BatchLoader((DATA, WEIGHTS), 4, pad_to=104)
    params, state, sizes = PARAMS, OPTIMIZER.init(PARAMS), []
    for n in range(40):
        loader.batch_size = cabs_jax.batch_size(state)
        sizes.append(int(loader.batch_size))
        params, state = step(params, state, *next(loader), jax.random.fold_in(KEY, n))

    loop = jax.jit(cabs_jax.on_device_loop(noisy_loss, OPTIMIZER, microbatch_size=8, max_steps=40))
    result, found = (PARAMS, OPTIMIZER.init(PARAMS), cabs_jax.Position(*jnp.zeros(2, int))), []
    for n in (25, 15):
        result = loop(*result[:2], DATA, result[2], n, rng=KEY, weights=WEIGHTS)
        found += result.metrics.batch_size[:n].tolist()
    assert found == sizes
    assert len(set(sizes)) > 5
    same(result[:2], (params, state))
    assert loop._cache_size() == 1


def test_a_batch_of_no_weight_changes_nothing_and_ends():
    result = on_device()(*started(), 3, weights=np.zeros(300))
    assert result.metrics.batch_size[:4].tolist() == [4, 4, 4, 0]
    jax.tree.map(np.testing.assert_array_equal, result[:2], started()[:2])


@pytest.mark.slow  # compiles the loop several times
def test_pieces_make_up_the_whole_and_compile_once():
    loop = on_device()
    start = PARAMS, OPTIMIZER.init(PARAMS)
    whole = loop(*start, DATA, cabs_jax.Position(), 60)
    sizes, result = [], (*start, cabs_jax.Position())
    for steps in (25, 34, 1):
        result = loop(*result[:2], DATA, result[2], steps)
        sizes += result.metrics.batch_size[:steps].tolist()
        assert not result.metrics.batch_size[steps:].any()
    np.testing.assert_array_equal(sizes, whole.metrics.batch_size)
    jax.tree.map(np.testing.assert_array_equal, result[:3], whole[:3])
    assert loop._cache_size() <= 2  # positions of Python numbers, and of arrays


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="microbatch_size must be positive, got 0"):
        cabs_jax.on_device_loop(loss_fn, OPTIMIZER, microbatch_size=0)
    with pytest.raises(ValueError, match="seed must be non-negative, got -1"):
        cabs_jax.on_device_loop(loss_fn, OPTIMIZER, seed=-1)
    with pytest.raises(ValueError, match="num_steps=11 exceeds max_steps=10"):
        cabs_jax.on_device_loop(loss_fn, OPTIMIZER, max_steps=10)(
            PARAMS, OPTIMIZER.init(PARAMS), DATA, cabs_jax.Position(), 11
        )
    with pytest.raises(ValueError, match="no batch size in this state"):
        on_device()(PARAMS, optax.sgd(0.1).init(PARAMS), DATA, cabs_jax.Position(), 1)
    with pytest.raises(ValueError, match="holds no examples"):
        on_device()(PARAMS, OPTIMIZER.init(PARAMS), {"x": np.ones((0, 5))}, cabs_jax.Position(), 1)
    with pytest.raises(TypeError, match="rng was given, but loss_fn takes no third argument"):
        on_device()(*started(), 1, rng=KEY)
    with pytest.raises(TypeError, match="pass one key as rng="):
        cabs_jax.on_device_loop(noisy_loss, OPTIMIZER)(*started(), 1)
    with pytest.raises(ValueError, match=r"weights must have shape \(300,\) like the batch"):
        on_device()(*started(), 1, weights=np.ones(299))


@pytest.mark.slow  # compiles the loop several times
def test_a_diagonal_variance_gives_the_same_run_and_drives_adam():
    start, position = OPTIMIZER.init(PARAMS), cabs_jax.Position()
    by_trace = on_device()(PARAMS, start, DATA, position, 20)
    by_diagonal = on_device(variance="diagonal")(PARAMS, start, DATA, position, 20)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), by_diagonal, by_trace
    )
    adam = cabs_jax.cabs_adam(0.2, scale=10.0, min_batch_size=4, max_batch_size=100)
    loop = cabs_jax.on_device_loop(
        loss_fn, adam, variance="diagonal", microbatch_size=8, max_steps=60
    )
    result = jax.jit(loop)(PARAMS, adam.init(PARAMS), DATA, position, 60)
    assert len(set(result.metrics.batch_size.tolist())) > 5
    np.testing.assert_allclose(result.params["w"], 1.0, atol=0.3)


def same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected
    )


@pytest.mark.slow  # compiles the loop several times
def test_a_traced_seed_gives_the_run_of_that_seed():
    def run(seed, steps):
        return cabs_jax.on_device_loop(
            loss_fn, OPTIMIZER, microbatch_size=8, max_steps=60, seed=seed
        )(PARAMS, OPTIMIZER.init(PARAMS), DATA, cabs_jax.Position(), steps)

    traced = jax.jit(run)(7, 60)
    jax.tree.map(np.testing.assert_array_equal, traced, on_device(seed=7)(*started(), 60))
    assert traced.metrics.value[0] != on_device(seed=8)(*started(), 60).metrics.value[0]


def started():
    return PARAMS, OPTIMIZER.init(PARAMS), DATA, cabs_jax.Position()


@pytest.mark.slow
def test_the_step_that_reaches_the_examples_is_the_last():
    loop = on_device()
    whole = loop(*started(), 60)
    seen = np.cumsum(whole.metrics.batch_size)
    for examples, steps in ((1, 1), (seen[20], 21), (seen[20] + 1, 22), (10**6, 60)):
        result = loop(*started(), num_examples=int(examples))
        jax.tree.map(np.testing.assert_array_equal, result, loop(*started(), steps))
    jax.tree.map(
        np.testing.assert_array_equal,
        loop(*started(), 5, num_examples=10**6),
        loop(*started(), 5),
    )
    assert not loop(*started(), num_examples=0).metrics.batch_size.any()
    with pytest.raises(ValueError, match="num_steps, num_examples or both"):
        loop(*started())


@pytest.mark.slow  # compiles the loop several times
def test_many_runs_at_once_are_those_made_one_by_one():
    def run(rate, seed):
        tx = cabs_jax.cabs(rate, scale=40.0, min_batch_size=4, max_batch_size=100)
        loop = cabs_jax.on_device_loop(loss_fn, tx, microbatch_size=8, max_steps=200, seed=seed)
        return loop(PARAMS, tx.init(PARAMS), DATA, cabs_jax.Position(), num_examples=1500)

    rates, seeds = jnp.array([0.02, 0.1, 0.3]), jnp.array([0, 1, 1])
    together = jax.jit(jax.vmap(run))(rates, seeds)
    steps = np.count_nonzero(together.metrics.batch_size, axis=1)
    assert len(set(steps)) == 3  # they end at different times
    one = jax.jit(run)
    for lane, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        expected = one(rate, seed)
        found = jax.tree.map(lambda x, lane=lane: x[lane], together)
        np.testing.assert_array_equal(found.metrics.batch_size, expected.metrics.batch_size)
        same(found, expected)


@pytest.mark.slow
def test_the_loss_of_averaged_parameters_reaches_the_rule():
    seen = []

    def rule(statistics):
        seen.append(statistics.averaged_excess is not None)
        return 4.0 + (statistics.averaged_excess > 0) * 20.0

    adapt = cabs_jax.adapt_batch_size(rule, min_batch_size=4, max_batch_size=100)
    tx = optax.chain(adapt, optax.scale_by_learning_rate(0.1))
    loop = cabs_jax.on_device_loop(
        loss_fn,
        tx,
        averaged_params=lambda state: {"w": jnp.ones(5), "b": jnp.zeros(())},
        microbatch_size=8,
        max_steps=10,
    )
    result = jax.jit(loop)(PARAMS, tx.init(PARAMS), DATA, cabs_jax.Position(), 10)
    assert all(seen)
    assert result.metrics.batch_size[1] == 24  # the true weights are better than the first
