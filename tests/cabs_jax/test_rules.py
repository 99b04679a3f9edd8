import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabs_jax import Statistics, rules

positive = st.floats(2**-10, 2**10, width=32)


def statistics(**changes):
    values = {
        "value": 0.5,
        "gradient_variance": 40.0,
        "squared_gradient_norm": 0.25,
        "count": 17,
        "step": 3,
        "batch_size": 18,
        "examples": 50.0,
    } | changes
    integers = ("count", "step", "batch_size")
    return Statistics(
        **{
            name: x if x is None else jnp.asarray(x, jnp.int32 if name in integers else jnp.float32)
            for name, x in values.items()
        }
    )


ALL_RULES = {
    "cabs": rules.cabs(0.5),
    "expected_progress": rules.expected_progress(0.5, lipschitz=2.0),
    "norm_test": rules.norm_test(0.5),
    "biased_norm_test": rules.biased_norm_test(0.5),
    "noise_scale": rules.noise_scale(),
    "big_batch": rules.big_batch(growth=0.5),
    "constant": rules.constant(32),
    "schedule": rules.schedule(lambda step: 2**step),
    "schedule of examples": rules.schedule([(0, 16), (50, 32), (51, 48)]),
    "seesaw": rules.seesaw(lambda step: 0.5**step, 16),
}
EXPECTED = {
    "cabs": 0.5 * 40 / 0.5,
    "expected_progress": 2 * 1.0 / (2 - 1.0) * 40 / 0.25,
    "norm_test": 40 / (0.5**2 * 0.25),
    "biased_norm_test": 40 / (0.5**2 * (0.25 + 40 / 16)),
    "noise_scale": 40 / 0.25,
    "big_batch": 18,
    "constant": 32,
    "schedule": 2**3,
    "schedule of examples": 32,
    "seesaw": 16 * 2**3,
}
NEED_THE_NORM = ["expected_progress", "norm_test", "biased_norm_test", "noise_scale", "big_batch"]


@pytest.mark.parametrize("name", ALL_RULES)
def test_rule_is_its_formula_as_a_float32_scalar(name):
    for rule in (ALL_RULES[name], jax.jit(ALL_RULES[name])):
        size = rule(statistics())
        assert size.shape == ()
        assert size.dtype == jnp.float32
        assert float(size) == pytest.approx(EXPECTED[name], rel=1e-6)


@pytest.mark.parametrize("name", ALL_RULES)
def test_rule_obeys_strict_dtype_promotion_and_debug_nans(name):
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        ALL_RULES[name](statistics())
        ALL_RULES[name](statistics(value=0.0, gradient_variance=0.0, squared_gradient_norm=0.0))


@given(positive, positive, positive, positive, positive)
@settings(max_examples=30, deadline=None)
def test_cabs_is_c_alpha_xi_over_the_gap(alpha, scale, eps, variance, gap):
    rule = rules.cabs(alpha, scale=scale, eps=eps, optimal_value=-2.0)
    value = np.float32(gap) - np.float32(2.0)
    size = rule(statistics(value=value, gradient_variance=variance))
    gap = float(value) + 2.0
    if gap > 0:
        assert float(size) == pytest.approx(scale * alpha * variance / (gap + eps), rel=1e-5)
    else:
        assert float(size) == math.inf


@pytest.mark.parametrize(("excess", "floor"), [(0.125, 2 * 1.5 * 18 * 0.125), (9.0, 1.5 * 20 / 2)])
def test_cabs_takes_the_smaller_of_half_the_noise_and_twice_the_excess(excess, floor):
    rule = rules.cabs(0.5, scale=1.5, optimal_value="estimated")
    gap = 0.75
    seen = statistics(estimated_gap=gap, averaged_excess=excess, raw_batch_size=floor / gap)
    assert float(rule(seen)) == pytest.approx(floor / gap, rel=1e-6)


@pytest.mark.slow
def test_cabs_calls_a_schedule_with_the_step():
    rule = rules.cabs(optax.piecewise_constant_schedule(1.0, {4: 0.5}))
    assert float(rule(statistics(step=3))) == 80.0
    assert float(rule(statistics(step=4))) == 40.0


def test_expected_progress_calls_a_schedule_with_the_step():
    rule = rules.expected_progress(lambda step: 0.125 * step, lipschitz=2.0)
    assert float(rule(statistics(step=4))) == pytest.approx(160 * 2 * 1.0 / (2 - 1.0))


@pytest.mark.parametrize("value", [1.0, 0.5])
@pytest.mark.parametrize("eps", [0.0, 10.0])
def test_cabs_asks_for_the_maximum_where_the_loss_is_optimal_or_below(value, eps):
    assert float(rules.cabs(0.1, optimal_value=1.0, eps=eps)(statistics(value=value))) == math.inf


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0])
def test_cabs_asks_for_the_minimum_without_noise_or_without_a_step(value):
    assert float(rules.cabs(0.1)(statistics(value=value, gradient_variance=0.0))) == 0.0
    assert float(rules.cabs(0.0)(statistics(value=value))) == 0.0
    assert float(rules.cabs(0.1, scale=0.0)(statistics(value=value))) == 0.0


def test_cabs_answers_nan_to_a_learning_rate_that_is_nan():
    assert math.isnan(rules.cabs(lambda step: jnp.nan)(statistics()))


@pytest.mark.parametrize("name", ["expected_progress", "norm_test", "noise_scale"])
@pytest.mark.parametrize("norm", [0.0, -0.25])
def test_maximum_where_the_squared_norm_is_not_positive(name, norm):
    assert float(ALL_RULES[name](statistics(squared_gradient_norm=norm))) == math.inf


@pytest.mark.parametrize("name", NEED_THE_NORM[:-1])
def test_minimum_without_noise(name):
    for norm in (0.25, 0.0):
        quiet = statistics(gradient_variance=0.0, squared_gradient_norm=norm)
        assert float(ALL_RULES[name](quiet)) == 0.0


@pytest.mark.parametrize("learning_rate", [1.0, 1.5])
@pytest.mark.parametrize("norm", [0.25, -0.25])
def test_expected_progress_asks_for_the_maximum_where_the_step_is_too_long(learning_rate, norm):
    rule = rules.expected_progress(learning_rate, lipschitz=2.0)
    assert float(rule(statistics(squared_gradient_norm=norm))) == math.inf


def test_expected_progress_asks_for_the_minimum_without_a_step():
    assert float(rules.expected_progress(0.0, lipschitz=2.0)(statistics())) == 0.0


@pytest.mark.parametrize("name", NEED_THE_NORM)
def test_rule_that_needs_the_count_says_so(name):
    with pytest.raises(ValueError, match=rf"rules\.{name} needs.*count=None"):
        ALL_RULES[name](statistics(count=None, squared_gradient_norm=None))


@pytest.mark.parametrize("name", ["cabs", "constant", "schedule"])
def test_other_rules_do_without_the_count(name):
    size = ALL_RULES[name](statistics(count=None, squared_gradient_norm=None))
    assert float(size) == EXPECTED[name]


def test_norm_test_at_one_is_the_noise_scale():
    assert rules.norm_test(1.0)(statistics()) == rules.noise_scale()(statistics())


@given(positive, positive, st.integers(2, 4096), st.floats(0.25, 0.875, width=32))
@settings(max_examples=30, deadline=None)
def test_biased_norm_test_asks_for_at_most_m_over_theta_squared(variance, norm, count, theta):
    rule = rules.biased_norm_test(theta)
    seen = statistics(gradient_variance=variance, squared_gradient_norm=norm, count=count)
    assert float(rule(seen)) <= count / theta**2


def test_biased_norm_test_of_a_single_example_subtracts_nothing():
    size = rules.biased_norm_test(0.5)(statistics(count=1, squared_gradient_norm=2.0))
    assert float(size) == pytest.approx(40 / (0.25 * (2.0 + 40.0)))


@pytest.mark.parametrize(
    ("theta", "unbiased", "grows"),
    [
        (1.0, -0.01, True),  # ‖ḡ‖² = 2.49 against V/m = ξ/(m − 1) = 2.5
        (1.0, 0.0, True),
        (1.0, 0.01, False),
        (0.5, 7.4, True),  # ‖ḡ‖²/4 = 2.475
        (0.5, 7.6, False),
        (2.0, -1.8, False),  # 4‖ḡ‖² = 2.8
        (2.0, -1.9, True),
    ],
)
def test_big_batch_compares_the_gradient_with_its_noise(theta, unbiased, grows):
    seen = statistics(squared_gradient_norm=unbiased, batch_size=18)
    assert float(rules.big_batch(theta)(seen)) == (20 if grows else 18)  # 18 + 1.8, rounded up


def test_big_batch_keeps_its_size_without_noise_and_grows_from_the_smallest():
    quiet = statistics(squared_gradient_norm=0.0, gradient_variance=0.0)
    assert float(rules.big_batch()(quiet)) == 18
    faint = statistics(gradient_variance=1e-3, squared_gradient_norm=-1e-5, batch_size=2)
    assert float(rules.big_batch()(faint)) == 3


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (rules.cabs, -0.5),
        (rules.cabs, math.nan),
        (rules.cabs, math.inf),
        (rules.cabs, "fast"),
        (rules.cabs, None),
        (lambda x: rules.cabs(0.1, scale=x), -0.5),
        (lambda x: rules.cabs(0.1, eps=x), -0.5),
        (lambda x: rules.cabs(0.1, optimal_value=x), math.inf),
        (lambda x: rules.expected_progress(x, 1.0), -0.5),
        (lambda x: rules.expected_progress(0.1, x), 0),
        (lambda x: rules.expected_progress(0.1, x), -2.5),
        (rules.norm_test, 0),
        (rules.norm_test, -0.5),
        (rules.biased_norm_test, 0),
        (rules.biased_norm_test, 1),
        (rules.biased_norm_test, 1.5),
        (rules.big_batch, 0),
        (lambda x: rules.big_batch(growth=x), -0.5),
        (rules.constant, 0),
        (rules.constant, -3),
        (rules.constant, 2**31),
        (rules.constant, 16.5),
    ],
)
def test_bad_argument_is_shown(make, bad):
    with pytest.raises(ValueError, match=str(bad)):
        make(bad)


def test_edges_of_the_ranges_are_allowed():
    rules.cabs(0, scale=0, eps=0, optimal_value=-5)
    rules.norm_test(3)
    rules.constant(1)
    assert float(rules.constant(2**31 - 1)(statistics())) == 2**31


def test_array_learning_rate_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        rules.cabs(jnp.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        jax.jit(lambda rate: rules.cabs(rate)(statistics()))(jnp.ones(2))


def test_schedule_must_be_callable():
    with pytest.raises(TypeError, match="32"):
        rules.schedule(32)


def test_traced_arguments_are_not_checked():
    size = jax.jit(lambda rate: rules.cabs(rate)(statistics()))(jnp.float32(0.25))
    assert float(size) == 20.0
    assert float(jax.jit(lambda n: rules.constant(n)(statistics()))(7)) == 7.0


@pytest.mark.slow
def test_low_precision_and_double_arguments_give_float32():
    with jax.numpy_dtype_promotion("strict"):
        for rate in (jnp.bfloat16(0.5), np.float64(0.5), jnp.float16(0.5), np.float32(0.5)):
            size = rules.cabs(rate)(statistics())
            assert size.dtype == jnp.float32
            assert float(size) == 40.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.cabs(1e39), r"got 1e\+39\. In float32 it is inf"),
        (lambda: rules.cabs(0.1, scale=1e39), r"scale.*float32 it is inf"),
        (lambda: rules.expected_progress(0.1, 1e-50), r"lipschitz.*float32 it is 0\.0"),
        (lambda: rules.biased_norm_test(1 - 1e-12), r"theta.*float32 it is 1\.0"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:the learning rate falls")
@pytest.mark.parametrize(
    "make", [rules.cabs, lambda rate: rules.expected_progress(rate, lipschitz=1.0)]
)
def test_a_schedule_below_zero_says_so_or_answers_nan(make):
    falling = make(lambda step: 0.1 - 0.2 * step)
    assert float(falling(statistics(step=jnp.int32(0)))) > 0
    with pytest.raises(ValueError, match=r"schedule gives -0\.3.* at step 2"):
        falling(statistics(step=jnp.int32(2)))
    for value in (1.0, -1.0):
        answer = jax.jit(falling)(statistics(value=value, step=jnp.int32(2)))
        assert math.isnan(answer)
    with pytest.raises(ValueError, match="schedule gives -1"):  # known while tracing
        jax.jit(make(lambda step: -1))(statistics())
