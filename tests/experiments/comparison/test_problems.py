import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.comparison import problems


@pytest.mark.slow  # minimises in float64
def test_the_optimum_is_one():
    problem = problems.noisy_digits([0, 1])
    start = jax.tree.map(lambda x: x[0], problem.starts)
    lowest, value = problems.minimum(problem.loss, start, problem.data)
    assert value == problem.optimum
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.asarray, lowest)
        found, slope = jax.value_and_grad(problems.mean_loss, argnums=1)(
            problem.loss, wide, problem.data
        )
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(slope)))
    # The penalty makes the loss 10⁻³-strongly convex in the weights: F − F* ≤ ‖∇F‖²/(2·10⁻³).
    assert norm**2 / 2e-3 < 1e-6
    np.testing.assert_allclose(float(found), value, rtol=1e-12)
    np.testing.assert_allclose(problem.untrained, np.log(10) - value, rtol=1e-5)


def test_a_search_that_ends_on_a_slope_is_no_minimum():
    def endless(params, example):
        return jnp.exp(params["w"]) * example["input"] - params["w"]

    data = {"input": jnp.full((3,), jnp.nan)}
    with pytest.raises(ArithmeticError, match="L-BFGS ended at a slope of nan"):
        problems.minimum(endless, {"w": jnp.zeros(())}, data)


@pytest.mark.slow
def test_the_net_on_clean_digits_starts_from_its_seed():
    problem = problems.clean_digits([3, 4])
    assert problem.optimum == 0.0
    assert problem.untrained.shape == (2,)
    kernels = problem.starts["dense1"]["kernel"]
    assert kernels.shape == (2, 64, 48)
    assert not np.array_equal(kernels[0], kernels[1])
