"""Options, batches and losses that cannot be: refused, at once or when traced."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from cabs_jax import gradient_moments

EXACT = ["factored", "per_example"]


def linear(p, x):
    """A loss whose gradient is the example."""
    return jnp.dot(p, x)


LOSS = lambda p, e: jnp.sum(p * e["x"])  # noqa: E731
BATCH = {"x": jnp.ones((6, 3)), "y": jnp.ones(6)}

HOSTILE = {
    "method": ({"method": "fastest"}, ValueError, "'fastest'"),
    "variance": ({"variance": "full"}, ValueError, "'full'"),
    "subsample 0": ({"subsample": 0}, ValueError, "subsample .* got 0"),
    "subsample 2.5": ({"subsample": 2.5}, ValueError, "subsample .* got 2.5"),
    "microbatch -1": ({"microbatch_size": -1}, ValueError, "microbatch_size .* got -1"),
    "groups 0": ({"method": "between", "groups": 0}, ValueError, "groups .* got 0"),
    "subsample by reference": (
        {"subsample": 4, "method": "per_example"},
        ValueError,
        "subsample=4",
    ),
    "subsample and blocks": ({"subsample": 4, "microbatch_size": 2}, ValueError, "size=2"),
    "groups elsewhere": ({"groups": 3}, ValueError, "groups=3"),
    "coupled by reference": ({"examples_per_loss": 2}, ValueError, "neither method='auto'"),
    "coupled 0": ({"method": "between", "examples_per_loss": 0}, ValueError, "got 0"),
    "coupled in groups": (
        {"method": "between", "examples_per_loss": 2, "groups": 2},
        ValueError,
        "groups=2",
    ),
    "coupled one by one": (
        {"method": "between", "examples_per_loss": 2, "keep_batch_dim": True},
        ValueError,
        "keep_batch_dim=True",
    ),
    "blocks between": ({"method": "between", "microbatch_size": 3}, ValueError, "size=3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_options_are_refused_at_once(name):
    options, error, message = HOSTILE[name]
    with pytest.raises(error, match=message):
        gradient_moments(LOSS, **options)


HOSTILE_CALLS = {
    "mask of floats": ({}, BATCH, jnp.ones(6), TypeError, "float32"),
    "mask as a list": ({}, BATCH, [True] * 6, TypeError, "list"),
    "mask too long": ({}, BATCH, jnp.ones(7, bool), ValueError, r"\(6,\).*\(7,\)"),
    "mask as a column": ({}, BATCH, jnp.ones((6, 1), bool), ValueError, r"\(6, 1\)"),
    "ragged": ({}, {"x": jnp.ones((6, 3)), "y": jnp.ones(5)}, None, ValueError, "'y'.*5"),
    "scalar leaf": ({}, {"x": jnp.ones((6, 3)), "y": jnp.ones(())}, None, ValueError, "'y'.*None"),
    "no example": ({}, {"x": jnp.ones((0, 3))}, None, ValueError, "no examples"),
    "no arrays": ({}, {}, None, ValueError, "none at all"),
    "blocks": ({"microbatch_size": 4}, BATCH, None, ValueError, "microbatch_size=4.*6"),
    "groups": ({"method": "between", "groups": 4}, BATCH, None, ValueError, "groups=4.*6"),
    "coupled": ({"method": "between", "examples_per_loss": 4}, BATCH, None, ValueError, "4 .*6"),
    "coupled mask": (
        {"method": "between", "examples_per_loss": 2},
        BATCH,
        jnp.ones(6, bool),
        ValueError,
        "no mask",
    ),
    "coupled, one group": (
        {"method": "between", "examples_per_loss": 6},
        BATCH,
        None,
        ValueError,
        "here there is 1",
    ),
    "one group": ({"method": "between"}, BATCH, None, ValueError, "here there is 1"),
}


@pytest.mark.parametrize("name", HOSTILE_CALLS)
def test_bad_batches_are_refused_when_traced(name):
    options, batch, mask, error, message = HOSTILE_CALLS[name]
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda p: gradient_moments(LOSS, **options)(p, batch, mask), jnp.ones(3))


BAD_LOSSES = {
    "vector": (lambda p, e: p * e["x"], r"shape \(3,\)"),
    "integer": (lambda p, e: jnp.int32(3), "int32"),
    "number": (lambda p, e: 1.0, "returned float"),
    "nothing": (lambda p, e: None, "returned NoneType"),
    "pair": (lambda p, e: (jnp.sum(p), e), "returned tuple.*has_aux=True"),
    "complex": (lambda p, e: jnp.sum(p).astype(jnp.complex64), "complex64"),
}


@pytest.mark.parametrize("loss", BAD_LOSSES)
@pytest.mark.parametrize("method", [*EXACT, "between"])
def test_a_loss_that_is_no_scalar_is_refused(loss, method):
    function, message = BAD_LOSSES[loss]
    groups = {"groups": 2} if method == "between" else {}
    with pytest.raises(TypeError, match=message):
        gradient_moments(function, method=method, **groups)(jnp.ones(3), BATCH)


def test_aux_that_is_missing_is_refused():
    with pytest.raises(TypeError, match=r"must return \(loss, aux\).*returned .*Tracer"):
        gradient_moments(lambda p, e: jnp.sum(p), has_aux=True)(jnp.ones(3), BATCH)


OPTIONS = {
    "method": ["auto", "factored", "per_example", "between"],
    "variance": ["trace", "by_parameter", "diagonal"],
    "subsample": [None, 4],
    "microbatch_size": [None, 2],
    "groups": [None, 4],
}


@pytest.mark.parametrize("values", [*itertools.product(*OPTIONS.values())], ids=str)
def test_every_combination_of_options_is_computed_or_refused(values):
    options = dict(zip(OPTIONS, values, strict=True))
    method, variance, subsample, block, groups = values
    between = method == "between"
    if (
        (subsample and (block or method in {"per_example", "between"}))
        or (groups is None) == between
        or (between and block)
    ):
        with pytest.raises(ValueError, match=r"subsample|groups|microbatch_size"):
            jax.eval_shape(gradient_moments(linear, **options), jnp.ones(3), jnp.ones((8, 3)))
        return
    m = jax.eval_shape(gradient_moments(linear, **options), jnp.ones(3), jnp.ones((8, 3)))
    assert m.mean.shape == (3,)
    assert m.variance.shape == ((3,) if variance == "diagonal" else ())
