import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cabs_jax import Info, Statistics, adapt_batch_size, batch_size, cabs, cabs_adam, rules
from tests.cabs_jax.steps import (
    ALPHA,
    PARAMS,
    after_one_step,
    assert_states_equal,
    moments,
    random_batch,
    update_with_moments,
)


def test_initial_state_is_that_of_the_authors():
    state = cabs(ALPHA).init(PARAMS)
    assert state.value_average == 1.0
    assert state.gradient_variance_average == 0.0
    assert state.squared_gradient_norm_average == 0.0
    assert state.weight == 0.0
    assert state.step == 0
    assert state.batch_size == 16
    known = {"raw_batch_size": 16.0, "learning_rate_scale": 1.0, "gradient_scale": 1.0}
    unknown = {"noise_scale": jnp.inf, "noise_scale_high": jnp.inf}
    expected = dict.fromkeys(Info._fields, 0.0) | known | unknown
    assert state.info._asdict() == expected
    assert cabs(ALPHA, debias=True).init(PARAMS).value_average == 0.0


def test_defaults_are_those_of_the_paper():
    state = after_one_step(cabs(ALPHA), value=2.0, variance=1e9)
    assert state.value_average == pytest.approx(0.95 * 1 + 0.05 * 2)
    assert state.gradient_variance_average == pytest.approx(0.05 * 1e9)
    assert state.batch_size == 2048


@pytest.mark.slow
def test_follows_the_recursion_of_the_paper_on_both_paths():
    count, decay, low, high = 6, 0.8, 2, 400
    tx = cabs(ALPHA, min_batch_size=low, max_batch_size=high, decay=decay)
    update = jax.jit(tx.update)
    state_a = state_b = tx.init(PARAMS)
    loss_avg, xi_avg, norm_avg, sizes = 1.0, 0.0, 0.0, []
    for step in range(12):
        losses, grads = random_batch(step, count)
        losses = losses / (1 + step)
        value, mean, xi = moments(losses, grads)
        norm = sum((g**2).sum() for g in mean.values())
        loss_avg = decay * loss_avg + (1 - decay) * value
        xi_avg = decay * xi_avg + (1 - decay) * xi
        norm_avg = decay * norm_avg + (1 - decay) * (norm - xi / (count - 1))
        raw = ALPHA * xi_avg / loss_avg
        expected_size = min(max(round(raw), low), high)
        sizes.append(expected_size)

        updates_a, state_a = update(grads, state_a, PARAMS, value=losses)
        mean32 = jax.tree.map(jnp.float32, mean)
        updates_b, state_b = update(
            mean32,
            state_b,
            PARAMS,
            value=jnp.float32(value),
            gradient_variance=jnp.float32(xi),
            count=count,
        )
        for updates, state in ((updates_a, state_a), (updates_b, state_b)):
            jax.tree.map(
                lambda u, g: np.testing.assert_allclose(u, -ALPHA * g, rtol=1e-5, atol=1e-6),
                updates,
                mean,
            )
            assert state.step == step + 1
            assert state.value_average == pytest.approx(loss_avg, rel=1e-5)
            assert state.gradient_variance_average == pytest.approx(xi_avg, rel=1e-5)
            assert state.squared_gradient_norm_average == pytest.approx(norm_avg, rel=1e-4)
            assert state.weight == pytest.approx(1 - decay ** (step + 1), rel=1e-5)
            assert state.info.raw_batch_size == pytest.approx(raw, rel=1e-5)
            assert state.info.value == pytest.approx(value, rel=1e-5)
            assert state.info.gradient_variance == pytest.approx(xi, rel=1e-5)
            assert state.info.mean_gradient_squared_norm == pytest.approx(norm, rel=1e-4)
            assert state.info.non_finite == 0
            assert batch_size(state) == expected_size
    assert len(set(sizes)) > 8


@pytest.mark.slow
def test_mean_of_the_losses_does_as_well_as_the_losses():
    losses, grads = random_batch(0)
    tx = cabs(ALPHA)
    by_example = tx.update(grads, tx.init(PARAMS), PARAMS, value=losses)
    by_mean = tx.update(grads, tx.init(PARAMS), PARAMS, value=losses.mean())
    assert_states_equal(by_mean, by_example, rtol=1e-6)


def test_diagonal_variance_does_as_well_as_its_trace():
    diagonal = {"b": jnp.array([1.0, 2.0]), "w": jnp.array([3.0, 4.0, 5.0])}
    tx = cabs(ALPHA, decay=0.0, min_batch_size=1)
    for variance in (15.0, jnp.float32(15.0), diagonal):
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=0.5, gradient_variance=variance)
        assert state.info.gradient_variance == 15.0
        assert state.batch_size == 15


@pytest.mark.slow
@pytest.mark.parametrize("filler", [0.0, 1e30, jnp.inf, jnp.nan])
def test_padding_has_no_influence_whatever_it_holds(filler):
    losses, grads = random_batch(1, 6)
    tx = cabs(ALPHA, decay=0.5)
    state = tx.init(PARAMS)
    expected = tx.update(grads, state, PARAMS, value=losses)
    mask = jnp.array([True, False, True, True, True, True, False, True])
    rows = jnp.array([0, 1, 1, 2, 3, 4, 5, 5])
    pad = lambda x: jnp.where(  # noqa: E731
        mask.reshape((8,) + (1,) * (x.ndim - 1)), x[rows], filler
    )
    masked = tx.update(jax.tree.map(pad, grads), state, PARAMS, value=pad(losses), mask=mask)
    assert_states_equal(masked, expected, rtol=1e-6)


def test_adapt_batch_size_returns_the_mean_gradient():
    losses, grads = random_batch(2)
    tx = adapt_batch_size(rules.cabs(ALPHA))
    averaged, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value=losses)
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), averaged, mean)
    passed_on, _ = tx.update(mean, tx.init(PARAMS), PARAMS, value=1.0, gradient_variance=1.0)
    assert_states_equal(passed_on, mean)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the learning rate falls")
def test_cabs_is_adapt_batch_size_followed_by_the_learning_rate():
    schedule = optax.linear_schedule(1.0, 0.1, 3)
    for rate in (0.3, jnp.float32(0.3), schedule):
        whole = cabs(rate, scale=90.0, eps=0.1, optimal_value=-0.5)
        parts = optax.chain(
            adapt_batch_size(rules.cabs(rate, scale=90.0, eps=0.1, optimal_value=-0.5)),
            optax.scale_by_learning_rate(rate),
        )
        state, states = whole.init(PARAMS), parts.init(PARAMS)
        for seed in range(4):
            losses, grads = random_batch(seed)
            updates, state = whole.update(grads, state, PARAMS, value=losses)
            expected, states = parts.update(grads, states, PARAMS, value=losses)
            assert_states_equal(updates, expected, rtol=1e-6)
            assert_states_equal(state, states[0], rtol=1e-6)
        assert state.info.bound == 0


@pytest.mark.parametrize("debias", [False, True])
def test_debias_divides_by_the_weight_of_the_steps_so_far(debias):
    seen = []
    tx = adapt_batch_size(lambda s: seen.append(s) or 16.0, decay=0.75, debias=debias)
    state = tx.init(0.0)
    for value, variance, gradient in ((2.0, 8.0, 3.0), (4.0, 16.0, 1.0)):
        _, state = update_with_moments(tx, state, value, variance, gradient, count=5)
    first, second = seen
    start, total = (0.0, (0.25, 0.4375)) if debias else (1.0, (1.0, 1.0))
    assert first.value == pytest.approx((0.75 * start + 0.5) / total[0])
    assert first.gradient_variance == pytest.approx(2.0 / total[0])
    assert first.squared_gradient_norm == pytest.approx(0.25 * (9 - 2) / total[0])
    assert second.value == pytest.approx((0.5625 * start + 0.375 + 1.0) / total[1])
    assert second.gradient_variance == pytest.approx((1.5 + 4.0) / total[1])
    norm_average = 0.75 * 0.25 * (9 - 2) + 0.25 * (1 - 4)
    assert second.squared_gradient_norm == pytest.approx(norm_average / total[1])


def test_rule_sees_the_statistics_of_the_step():
    seen = []

    def rule(statistics):
        seen.append(statistics)
        return 7.0 * (statistics.step + 3)

    tx = adapt_batch_size(rule, min_batch_size=4, initial_batch_size=9)
    _, state = update_with_moments(tx, tx.init(0.0), count=5)
    _, state = update_with_moments(tx, state)
    assert isinstance(seen[0], Statistics)
    assert (seen[0].step, seen[0].count, seen[0].batch_size) == (0, 5, 9)
    assert (seen[1].step, seen[1].batch_size) == (1, 21)
    assert seen[1].count is None
    assert seen[1].squared_gradient_norm is None
    assert state.batch_size == 28
    for leaf in jax.tree.leaves(seen):
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_single_example_subtracts_nothing_from_the_squared_norm():
    state = after_one_step(cabs(0.1, decay=0.0), gradient=3.0, count=1)
    assert state.squared_gradient_norm_average == 9.0


@pytest.mark.parametrize(
    ("raw", "size", "bound"),
    [(15.9, 16, -1), (16.0, 16, 0), (20.5, 20, 0), (64.0, 64, 0), (64.1, 64, 1), (jnp.inf, 64, 1)],
)
def test_info_tells_raw_size_and_bound(raw, size, bound):
    state = after_one_step(adapt_batch_size(lambda _: raw, max_batch_size=64))
    assert state.batch_size == size
    assert state.info.raw_batch_size == np.float32(raw)
    assert state.info.bound == bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float32, pytest.param(jnp.float16, marks=pytest.mark.exhaustive)]
)
@pytest.mark.filterwarnings("ignore:the learning rate falls")
def test_state_is_float32_and_int32_and_updates_keep_the_dtype(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    losses, grads = random_batch(5, dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        for rate in (
            ALPHA,
            jnp.float32(ALPHA),
            lambda step: ALPHA / (1.0 + step.astype(jnp.float32)),
        ):
            tx = cabs(rate)
            update = jax.jit(tx.update)
            updates, state = update(grads, tx.init(params), params, value=losses.astype(dtype))
            mean = jax.tree.map(lambda g: g.mean(0), grads)
            _, passed_on = update(
                mean, state, params, value=losses.mean(), gradient_variance=1.0, count=6
            )
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
            for leaf in jax.tree.leaves((state, passed_on)):
                assert leaf.shape == ()
                assert leaf.dtype in (jnp.float32, jnp.int32)
                assert not leaf.weak_type
    value, _, xi = moments(losses.astype(dtype), grads)
    assert state.info.gradient_variance == pytest.approx(xi, rel=1e-5)
    assert state.info.value == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_state_stays_float32_with_double_precision_enabled():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params = jnp.zeros(3, jnp.float64)
        tx = cabs(0.1, round_to=(16, 32, 64))
        grads = jnp.arange(12.0).reshape(4, 3)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params, value=jnp.ones(4))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, [-0.45, -0.55, -0.65], rtol=1e-7)


def test_debug_nans_finds_nothing_to_complain_of():
    with jax.debug_nans(True):
        for debias in (False, True):
            tx = cabs(ALPHA, debias=debias, decay=0.0)
            state = after_one_step(tx, value=0.0, variance=0.0, count=1)
            update_with_moments(tx, state, value=0.0, variance=5.0, count=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the learning rate falls")
def test_one_compilation_for_all_values():
    tx = cabs(optax.linear_schedule(0.1, 0.0, 10))
    traces = []

    @jax.jit
    def step(grads, state, losses):
        traces.append(1)
        return tx.update(grads, state, PARAMS, value=losses)[1]

    state = tx.init(PARAMS)
    for seed in range(3):
        losses, grads = random_batch(seed)
        state = step(grads, state, losses)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("mean_loss", [False, True])
def test_axis_name_averages_over_the_shards(axis_type, mean_loss):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    losses, grads = random_batch(6, examples=16)
    mask = jnp.arange(16) < 13
    value = jnp.mean(losses[:13]) if mean_loss else losses
    tx = cabs(ALPHA, axis_name="data", decay=0.5)
    state = tx.init(PARAMS)
    split, whole = jax.P("data"), jax.P()

    @jax.jit
    def step(grads, state, value, mask):
        return jax.shard_map(
            lambda g, s, v, m: tx.update(g, s, PARAMS, value=v, mask=m),
            mesh=mesh,
            in_specs=(split, whole, whole if mean_loss else split, split),
            out_specs=whole,
        )(grads, state, value, mask)

    def place(x, spec):
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    actual = step(
        place(grads, split),
        place(state, whole),
        place(value, whole if mean_loss else split),
        place(mask, split),
    )
    single = cabs(ALPHA, decay=0.5)
    expected = single.update(grads, state, PARAMS, value=value, mask=mask)
    assert_states_equal(jax.device_get(actual), jax.device_get(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch_size": 64, "max_batch_size": 32}, "64 and 32"),
        ({"decay": 1.0}, r"decay.*\[0, 1\).*got 1.0"),
        ({"decay": -0.25}, "decay.*got -0.25"),
        ({"decay": jnp.nan}, "decay.*got nan"),
        ({"initial_batch_size": 8}, r"\[16, 2048\], got 8"),
        ({"initial_batch_size": 4096}, "got 4096"),
        ({"round_to": 0}, "round_to.*got 0"),
        ({"max_batch_size": 2**31}, "2147483648"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda **o: cabs(0.1, **o), lambda **o: adapt_batch_size(rules.constant(9), **o)]
)
def test_hostile_options_are_shown(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options", [{"learning_rate": -0.1}, {"learning_rate": 0.1, "scale": -0.1}]
)
def test_cabs_checks_the_arguments_of_its_rule(options):
    with pytest.raises(ValueError, match=r"-0\.1"):
        cabs(**options)


def test_rule_must_be_a_function():
    with pytest.raises(TypeError, match=r"got 0\.5"):
        adapt_batch_size(0.5)


def test_rule_must_return_a_scalar():
    with pytest.raises(ValueError, match=r"scalar.*\(2,\)"):
        after_one_step(adapt_batch_size(lambda _: jnp.ones(2)))


def test_rule_that_needs_the_count_says_so_in_update():
    with pytest.raises(ValueError, match=r"count=moments\.count"):
        after_one_step(adapt_batch_size(rules.noise_scale()))
    assert after_one_step(adapt_batch_size(rules.noise_scale()), count=4).step == 1


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (rules.expected_progress(0.5, lipschitz=2.0), 2 * 12 / 6),
        (rules.norm_test(0.5), 4 * 12 / 6),
        (rules.biased_norm_test(0.5), 4 * 12 / 9),
        (rules.noise_scale(), 12 / 6),
        (rules.constant(33), 33),
        (rules.schedule(lambda step: 40 + step), 40),
    ],
)
def test_every_rule_drives_the_transformation(rule, size):
    tx = adapt_batch_size(rule, min_batch_size=1, decay=0.0)
    state = after_one_step(tx, variance=12.0, gradient=3.0, count=5)
    assert state.info.raw_batch_size == pytest.approx(size)
    assert state.batch_size == round(size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        cabs(0.1),
        cabs(0.1, momentum=0.9, debias=True),
        cabs_adam(0.1),
        optax.inject_hyperparams(
            cabs, static_args=("min_batch_size", "max_batch_size", "round_to")
        )(0.1),
    ],
)
def test_a_fresh_state_can_be_donated(tx):
    params = {"w": jnp.ones(3)}
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
