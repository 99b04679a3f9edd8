"""The statistics of the study, against numbers made by hand."""

import numpy as np
import pytest

from experiments.report import devices, intervals
from experiments.report.devices import StepCost, Work
from experiments.report.intervals import CONFIRMED, CONTRADICTED, UNDECIDED, Interval
from experiments.report.statistics import (
    Reached,
    at_batch_size,
    choose_rate,
    decades_within,
    log_excess,
    noise_floor,
    running_median,
    time_to_target,
)

EXAMPLES = np.arange(6) * 2000.0
INFINITY = float("inf")


def test_one_lucky_evaluation_is_not_the_target():
    lucky = np.array([2.0, 2.0, 0.1, 2.0, 2.0, 0.1])
    assert running_median(lucky).tolist() == [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert time_to_target(EXAMPLES, lucky, 1.0) == Reached(10_000.0, False)


def test_a_steady_curve_keeps_its_crossing():
    halving = 2.0 ** (1 - np.arange(6))  # 2, 1, ½ …: at 0.75 after log₂(2 / 0.75) evaluations
    found = time_to_target(EXAMPLES, halving, 0.75)
    assert found.is_reached
    assert found.cost == pytest.approx(2000 * np.log2(2 / 0.75))
    steps = time_to_target(EXAMPLES / 16, halving, 0.75)
    assert steps.cost == pytest.approx(found.cost / 16)


def test_a_diverged_run_has_the_budget_as_a_bound():
    diverged = np.array([2.0, 1.5, np.nan, np.nan, np.nan, np.nan])
    assert time_to_target(EXAMPLES, diverged, 1.0) == Reached(10_000.0, False)
    recovered = np.array([2.0, np.nan, np.nan, 0.5, 0.5, 0.5])
    assert time_to_target(EXAMPLES, recovered, 1.0) == Reached(6000.0, True)


def test_curves_of_one_or_two_evaluations_are_taken_as_they_are():
    assert time_to_target(EXAMPLES[:1], np.array([2.0]), 1.0) == Reached(0.0, False)
    assert time_to_target(EXAMPLES[:2], np.array([4.0, 1.0]), 2.0) == Reached(1000.0, True)


def test_excess_is_over_the_best_of_all_and_no_worse_than_untrained():
    losses = np.array([[1.0, 2.0, 8.0, np.nan], [1.0, 1.0, 1.0, np.inf]])
    by_hand = np.log([[1, 2, 4, 4], [1, 1, 1, 4]]).mean(axis=1)
    np.testing.assert_allclose(log_excess(losses, 1.0, 4.0), by_hand)
    halved = log_excess(losses, np.array([0.5, 1.0]), 4.0)
    np.testing.assert_allclose(halved, by_hand + np.array([np.log(2), 0.0]))
    capped = log_excess(losses, 1.0, np.array([4.0, 2.0]))
    np.testing.assert_allclose(capped, [by_hand[0], np.log(2) / 4])


def test_decades_of_the_rate_are_counted_up_to_the_bound():
    assert decades_within([0.1, 1.0, 10.0], [1.0, 1.0, 4.0], 2.0) == pytest.approx(1.5)
    assert decades_within([0.1, 1.0], [0.0, 4.0], 2.0) == 0
    assert decades_within([0.1], [1.0], 2.0) == 0


@pytest.mark.parametrize(
    ("losses", "rate", "extend"),
    [
        ([[3.0, 3.0], [1.0, 4.0], [2.0, 2.5]], 0.2, None),  # of products 9, 4, 5
        ([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], 0.1, 0.05),
        ([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]], 0.4, 0.8),
        ([[3.0, 3.0], [2.0, 2.0], [1.0, np.nan]], 0.2, None),
        ([[np.inf, np.inf], [np.nan, 1.0], [np.inf, 1.0]], 0.1, 0.05),
    ],
)
def test_the_rate_is_that_of_the_lowest_mean_logarithm(losses, rate, extend):
    assert choose_rate([0.1, 0.2, 0.4], np.array(losses)) == (rate, extend)


def test_one_rate_is_no_choice():
    with pytest.raises(ValueError, match=r"takes at least two, got \[0\.1\]\.$"):
        choose_rate([0.1], np.array([[1.0]]))


def test_between_constant_sizes_what_they_gave_is_linear_in_the_logarithm():
    values = np.array([[0.0, 10.0], [3.0, 4.0], [4.0, 8.0]])
    np.testing.assert_allclose(at_batch_size(32, [16, 128, 512], values), [1.0, 8.0])
    np.testing.assert_allclose(at_batch_size(256, [16, 128, 512], values), [3.5, 6.0])
    np.testing.assert_allclose(at_batch_size(512, [16, 128, 512], values), [4.0, 8.0])
    assert np.isnan(at_batch_size(15, [16, 128, 512], values)).all()
    assert np.isnan(at_batch_size(513, [16, 128, 512], values)).all()


def test_the_floor_is_where_a_quadratic_settles():
    # w ← w − α(w + noise), ξ = 8, m = 16: the variance v = (1 − α)²v + α²ξ/m, the loss v / 2.
    rate = 0.01
    settled = rate**2 * 8 / 16 / (1 - (1 - rate) ** 2) / 2
    found = noise_floor(rate, np.array([8.0]), np.array([16.0]))
    np.testing.assert_allclose(found, rate * 8 / 64)
    np.testing.assert_allclose(found, settled, rtol=0.01)


def runs(*costs):
    """One reached run for each cost; a string is a bound."""
    return [Reached(float(c), not isinstance(c, str)) for c in costs]


def test_costs_are_paired_by_seed_and_averaged_over_targets():
    ours = [runs(100, 400, 100), runs(200, 800, 800)]
    theirs = [runs(200, 400, 400), runs(200, 400, 400)]
    # ln 2 times, by target, (−1, 0, −2) and (0, 1, 1): by seed −½, ½, −½.
    found = intervals.compare(ours, theirs, [1.0, 0.5])
    assert found.log_ratio.mean == pytest.approx(-np.log(2) / 6)
    deviation = np.log(2) / np.sqrt(3)
    assert found.log_ratio.deviation == pytest.approx(deviation)
    half = 4.302653 * deviation / np.sqrt(3)  # t of 2 degrees of freedom
    assert found.log_ratio.high == pytest.approx(-np.log(2) / 6 + half, rel=1e-6)
    assert found.ratio == pytest.approx(2 ** (-1 / 6))
    assert found.targets == (1.0, 0.5)


def test_a_target_that_neither_side_reaches_is_dropped_and_bounds_are_counted():
    ours = [runs(100, 100), runs("900", "900"), runs("900", 450)]
    theirs = [runs(100, 200), runs("900", "900"), runs("900", "900")]
    found = intervals.compare(ours, theirs, [1.0, 0.1, 0.5])
    assert found.targets == (1.0, 0.5)
    assert (found.ours_unreached, found.theirs_unreached) == (1, 2)
    assert found.log_ratio.mean == pytest.approx(-np.log(2) / 2)
    assert intervals.compare(ours[1:2], theirs[1:2], [0.1]) is None


def test_a_target_that_an_untrained_net_meets_is_refused():
    with pytest.raises(ValueError, match=r"at the target 3 untrained; choose a lower one\.$"):
        intervals.compare([runs(0)], [runs(100)], [3.0])
    with pytest.raises(ValueError, match=r"take the same seeds, got 1 and 2 runs\.$"):
        intervals.compare([runs(1)], [runs(1, 2)], [3.0])


@pytest.mark.parametrize(
    ("low", "high", "limit", "claim", "verdict"),
    [
        (-0.3, -0.1, 0.0, "below", CONFIRMED),
        (0.1, 0.3, 0.0, "below", CONTRADICTED),
        (-0.1, 0.3, 0.0, "below", UNDECIDED),
        (-0.1, 0.04, np.log(1.05), "below", CONFIRMED),
        (-0.008, 0.02, -0.01, "above", CONFIRMED),
        (-0.03, -0.02, -0.01, "above", CONTRADICTED),
        (0.0, 0.0, 0.0, "below", UNDECIDED),
    ],
)
def test_an_interval_decides_where_it_lies_on_one_side(low, high, limit, claim, verdict):
    interval = Interval((low + high) / 2, low, high, 0.1, 5)
    assert intervals.decide(interval, limit, claim).verdict == verdict


def test_an_undecided_verdict_tells_how_many_seeds_would_decide():
    interval = intervals.t_interval([-3.0, 1.0, -1.0])  # mean −1, deviation 2
    undecided = intervals.decide(interval, 0.0)
    # With t(0.975, n − 1) from a table: 2.120 · 2 / √17 = 1.028 and 2.110 · 2 / √18 = 0.995.
    assert undecided == (UNDECIDED, 18)
    assert intervals.decide(intervals.t_interval([1.0]), 0.0) == (UNDECIDED, None)
    assert intervals.decide(intervals.t_interval([-1.0, 1.0]), 0.0) == (UNDECIDED, None)
    with pytest.raises(ValueError, match="got 'beside'"):
        intervals.decide(interval, 0.0, "beside")


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_an_interval_takes_finite_values(values):
    with pytest.raises(ValueError, match="takes finite values, one a seed"):
        intervals.t_interval(values)


def test_the_cost_of_a_step_is_fitted_and_never_negative():
    sizes = np.array([16, 64, 256])
    assert devices.fit_step_cost(sizes, 0.002 + 0.0005 * sizes) == pytest.approx((0.002, 0.0005))
    assert devices.fit_step_cost(sizes, 0.0005 * sizes - 0.002).step == 0
    with pytest.raises(ValueError, match="two batch sizes or more"):
        devices.fit_step_cost([16, 16], np.array([1.0, 1.0]))


def test_each_method_is_the_quickest_between_the_devices_where_lines_cross():
    cost = StepCost(step=1.0, example=0.01)
    works = {
        "many steps": Work(steps=1000, examples=10_000),  # 1000 + 100/d
        "some": Work(steps=900, examples=60_000),  # 900 + 600/d: from d = 5
        "few": Work(steps=500, examples=1_060_000),  # 500 + 10600/d: from d = 25
        "never": Work(steps=950, examples=500_000),
    }
    found = devices.quickest(works, cost)
    assert list(found) == ["many steps", "some", "few"]
    assert found["many steps"] == pytest.approx((1.0, 5.0))
    assert found["some"] == pytest.approx((5.0, 25.0))
    assert found["few"] == pytest.approx((25.0, INFINITY))
    for count in (1, 3, 5.5, 20, 30, 1e6):
        times = {name: float(devices.seconds(work, cost, count)) for name, work in works.items()}
        low, high = found[min(times, key=times.get)]
        assert low <= count <= high


def test_devices_do_not_matter_to_a_method_of_fewer_steps_and_examples():
    works = {"worse": Work(100, 2000), "better": Work(90, 1000), "same": Work(90, 1000)}
    for cost in (StepCost(1.0, 1.0), StepCost(0.0, 1.0), StepCost(1.0, 0.0)):
        assert devices.quickest(works, cost) == {"better": (1.0, INFINITY)}
