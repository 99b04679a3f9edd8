import jax
import numpy as np
import optax
import pytest

import cabs_jax
from experiments.comparison import outcome, problems, runs
from experiments.training import averages, descent

pytestmark = pytest.mark.slow  # compiles a grid of runs


@pytest.fixture(scope="module")
def problem():
    return problems.noisy_digits([0, 7])


@pytest.fixture(scope="module")
def found(problem):
    grid = runs.Grid(runs.MAIN, (0.1, 2.0), (0, 7))
    ends = (2_000, 4_000)
    stretches = runs.stretches(problem, grid, ends)
    return outcome.collect(problem.title, grid, ends, problem.untrained, stretches)


def test_a_run_of_the_grid_is_the_same_run_made_alone(problem, found):
    for method, rule in {
        "constant 16": cabs_jax.rules.constant(16),
        "CABS, estimated": cabs_jax.rules.cabs(2.0, optimal_value="estimated"),
    }.items():
        adapt = cabs_jax.adapt_batch_size(rule)
        optimizer = averages.with_averages(
            descent.descend(adapt, optax.identity(), descent.constant(2.0))
        )
        loop = cabs_jax.on_device_loop(
            problem.loss, optimizer, averaged_params=lambda state: state.exponential, seed=7
        )
        start = jax.tree.map(lambda x: x[1], problem.starts)
        state, position = optimizer.init(start), cabs_jax.Position()
        result = jax.jit(loop)(start, state, problem.data, position, num_examples=4_000)
        sizes = np.trim_zeros(np.asarray(result.metrics.batch_size))
        np.testing.assert_allclose(found.sizes(method, 2.0, 7), sizes, atol=1)


def test_losses_are_those_above_the_optimum_and_sizes_those_of_the_methods(found):
    assert found.loss.min() > 0
    assert found.averaged_loss.min() > 0
    assert (found.loss[:, 0, :, -1] < found.untrained).all()
    assert set(found.sizes("constant 128", 0.1, 0)) == {128}
    assert set(found.sizes("constant 16", 0.1, 7)) == {16}
    assert found.sizes("constant 128", 0.1, 0).sum() == 32 * 128  # one batch beyond 4,000 at most
    grown = found.sizes("CABS, estimated", 2.0, 0)
    assert grown.max() > grown[0] == 16


def test_stretches_make_up_the_whole(problem, found):
    method = "CABS, estimated"
    grid = runs.Grid((method,), (0.1, 2.0), (0, 7))
    (whole,) = runs.stretches(problem, grid, [4_000])
    place = runs.MAIN.index(method)
    np.testing.assert_allclose(whole.loss[0], found.loss[place, ..., -1], rtol=1e-3)


@pytest.mark.exhaustive  # compiles six loops
def test_momentum_and_adam_are_the_librarys_at_rates_of_their_own(problem):
    methods = ("CABS, Adam", "constant 16", "CABS, momentum")
    grid = runs.Grid(methods, (0.5,), (7,))
    (stretch,) = runs.stretches(problem, grid, [500])
    momentum, adam = cabs_jax.cabs(0.05, momentum=0.9), cabs_jax.cabs_adam(0.005)
    for place, optimizer, variance in ((2, momentum, "trace"), (0, adam, "diagonal")):
        loop = cabs_jax.on_device_loop(problem.loss, optimizer, seed=7, variance=variance)
        start = jax.tree.map(lambda x: x[1], problem.starts)
        state, position = optimizer.init(start), cabs_jax.Position()
        result = jax.jit(loop)(start, state, problem.data, position, num_examples=500)
        sizes = np.trim_zeros(np.asarray(result.metrics.batch_size))
        np.testing.assert_array_equal(np.trim_zeros(stretch.batch_sizes[place, 0, 0]), sizes)
        loss = problems.mean_loss(problem.loss, result.params, problem.data) - problem.optimum
        np.testing.assert_allclose(stretch.loss[place, 0, 0], loss, rtol=1e-3)
    assert outcome.rate_of("CABS, Adam", 0.5) == 0.005


@pytest.mark.exhaustive  # compiles them all at once, for half a minute
def test_all_methods_run_beside_each_other(problem):
    grid = runs.Grid(tuple(runs.METHODS), (0.5,), (0, 7))
    (stretch,) = runs.stretches(problem, grid, [1_000])
    assert np.isfinite(stretch.loss).all()
    first = dict(zip(grid.methods, stretch.batch_sizes[:, 0, 0, 0], strict=True))
    assert first == {
        name: int(name.split(",")[0].split()[1]) if name.startswith("constant") else 16
        for name in runs.METHODS
    }


def test_a_summary_counts_no_loss_beyond_the_untrained():
    grid = runs.Grid(("constant 16", "CABS"), (0.1, 1.0), (0,))
    loss = np.array([[[[0.1]], [[np.nan]]], [[[0.2]], [[0.4]]]])
    sizes = np.ones((2, 2, 1, 1), int)
    made = outcome.Outcome("", grid, (1,), np.array([2.5]), loss, loss, sizes)
    summary = outcome.summaries(made)
    assert summary["constant 16", False].best == pytest.approx(0.1)
    assert summary["CABS", False].best_rate == 0.1
    assert summary["constant 16", False].excess == pytest.approx(5.0)  # √(1 · 25)
    assert summary["CABS", False].excess == pytest.approx(8**0.5)
    assert [record["loss_above_optimum"] for record in outcome.records(made)][1] == [None]
