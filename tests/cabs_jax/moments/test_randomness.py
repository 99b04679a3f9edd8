"""One key for a batch: every real example draws from its own, however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import gradient_moments, per_example_value_and_grad
from cabs_jax.moments.randomness import check_rng
from tests.cabs_jax.moments.oracle import assert_close
from tests.cabs_jax.moments.oracle import moments as oracle_moments
from tests.cabs_jax.moments.test_sharding import WAYS, mesh_of, place

PARAMS = {"b": jnp.ones(2), "w": jnp.arange(6.0).reshape(2, 3) / 6}
X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
KEEP = np.arange(24) % 5 != 2
KEYS = {"typed": jax.random.key(3), "raw": jax.random.PRNGKey(3)}
OPTIONS = {
    "factored": {},
    "diagonal": {"variance": "diagonal"},
    "per_example": {"method": "per_example"},
    "microbatches": {"microbatch_size": 4},
    "per_example in microbatches": {"microbatch_size": 4, "method": "per_example"},
}


def loss_fn(params, x, rng):
    kept = jax.random.bernoulli(rng, 0.5, x.shape)
    return jnp.sum((params["w"] @ jnp.where(kept, x, 0) + params["b"]) ** 2)


@functools.cache
def expected(kind="typed", variance="trace"):
    """Moments of the real examples, number i with the key that is folded with i."""
    real = X[KEEP]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEYS[kind], jnp.arange(len(real)))
    draws = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    rows = np.where(draws, real, 0).astype(np.float64)
    outputs = rows @ np.asarray(PARAMS["w"], np.float64).T + np.asarray(PARAMS["b"], np.float64)
    grads = {"b": 2 * outputs, "w": 2 * outputs[:, :, None] * rows[:, None]}
    return oracle_moments((outputs**2).sum(1), grads, variance)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "typed") for name in OPTIONS), ("factored", "raw")]
)
def test_the_draws_are_those_of_the_real_examples_alone(name, kind):
    function = jax.jit(gradient_moments(loss_fn, **OPTIONS[name]))
    padded = np.where(KEEP[:, None], X, np.nan)
    m = function(PARAMS, padded, jnp.asarray(KEEP), rng=KEYS[kind])
    assert_close(m, expected(kind, OPTIONS[name].get("variance", "trace")))


@pytest.mark.slow
def test_the_draws_do_not_depend_on_the_groups():
    function = jax.jit(gradient_moments(loss_fn, method="between", groups=6))
    m = function(PARAMS, X, jnp.asarray(KEEP), rng=KEYS["typed"])
    assert_close((m.value, m.mean), (expected().value, expected().mean))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind"),
    [*((way, "typed") for way in WAYS), ("Auto", "raw"), ("shard_map that checks", "raw")],
)
def test_the_draws_do_not_depend_on_the_shards(way, kind):
    mesh_kind, make = WAYS[way]
    mesh = mesh_of(mesh_kind)
    placed = place(mesh, PARAMS, X, jnp.asarray(KEEP))
    if way.startswith("shard_map"):
        function = jax.shard_map(
            lambda p, b, k, rng: gradient_moments(loss_fn, axis_name="data")(p, b, k, rng=rng),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data"), P()),
            out_specs=P(),
            check_vma=way == "shard_map that checks",
        )
        m = jax.jit(function)(*placed, jax.device_put(KEYS[kind], NamedSharding(mesh, P())))
    else:
        m = jax.jit(make(loss_fn, mesh, {}))(*placed, rng=KEYS[kind])
    assert_close(m, expected(kind))


@pytest.mark.slow
def test_shards_of_two_axes_are_counted_in_order():
    mesh = mesh_of(jax.sharding.AxisType.Auto, (4, 2), ("a", "b"))
    function = gradient_moments(loss_fn, mesh=mesh, axis_name=("b", "a"))
    m = jax.jit(function)(PARAMS, X, jnp.asarray(KEEP), rng=KEYS["typed"])
    assert_close(m, expected())


def test_averaged_weights_see_the_same_draws():
    function = jax.jit(gradient_moments(loss_fn))
    m = function(PARAMS, X, rng=KEYS["typed"], averaged_params=PARAMS)
    np.testing.assert_allclose(m.averaged_value, m.value, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one device", "Explicit", "Auto, mesh="])
def test_per_example_gradients_draw_alike(way):
    batch, options = X[KEEP][:16], {}
    if way != "one device":
        mesh = mesh_of(WAYS[way][0])
        _, batch = place(mesh, PARAMS, batch)
        options = {"mesh": mesh} if "mesh=" in way else {}
    losses, grads = jax.jit(per_example_value_and_grad(loss_fn, **options))(
        PARAMS, batch, rng=KEYS["raw"]
    )
    m = jax.jit(gradient_moments(loss_fn))(PARAMS, X[KEEP][:16], rng=KEYS["raw"])
    assert_close(losses.mean(), m.value)
    assert_close(jax.tree.map(lambda g: g.mean(0), grads), m.mean)


@pytest.mark.slow
def test_a_batch_of_one_and_aux_are_given_the_key_too():
    def with_aux(params, batch, rng):
        return loss_fn(params, batch[0], rng)[None], jax.random.uniform(rng)

    function = jax.jit(gradient_moments(with_aux, keep_batch_dim=True, has_aux=True))
    m, drawn = function(PARAMS, X[KEEP], rng=KEYS["typed"])
    assert_close(m, expected())
    last = jax.random.fold_in(KEYS["typed"], len(drawn) - 1)
    assert drawn[-1] == jax.random.uniform(last)


WRONG = {
    "no key": (loss_fn, None, TypeError, "takes three arguments.*pass one key as rng="),
    "a key too many": (lambda p, x: p["b"][0], KEYS["typed"], TypeError, "takes no third argument"),
    "a seed": (loss_fn, 0, TypeError, "must be one key.* got int"),
    "numbers": (loss_fn, jnp.ones(2), TypeError, "must be one key.* got float32"),
    "keys": (loss_fn, jax.random.split(KEYS["typed"], 24), ValueError, r"one key.*shape \(24,\)"),
    "raw keys": (loss_fn, jax.random.split(KEYS["raw"], 24), ValueError, r"shape \(24, 2\)"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("make", [gradient_moments, per_example_value_and_grad])
def test_keys_that_are_missing_or_wrong_are_refused(name, make):
    loss, rng, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make(loss)(PARAMS, X, rng=rng)


def test_a_third_argument_that_may_be_left_out_is_left_out():
    def loss(params, x, training=False):
        assert not training
        return jnp.dot(params["w"][0], x)

    assert jax.eval_shape(gradient_moments(loss), PARAMS, X).value.shape == ()


def test_a_function_that_does_not_tell_its_arguments_is_not_judged():
    check_rng(None, max)
    check_rng(KEYS["typed"], max)
