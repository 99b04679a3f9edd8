"""Adam's average of squares is one over the same examples, whatever the batch sizes were."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from cabs_jax import cabs_adam, scale_by_adam

PARAMS = {"w": jnp.zeros(3), "half": jnp.zeros(2, jnp.bfloat16)}
SIZE, B2 = 64, 0.98
HALF_LIFE = SIZE * math.log(2) / -math.log(B2)


def gradient(step):
    keys = jax.random.split(jax.random.key(step))
    return {
        "w": jax.random.normal(keys[0], (3,)),
        "half": jax.random.normal(keys[1], (2,), jnp.bfloat16),
    }


def along(tx, steps, **extra_args):
    state, given = tx.init(PARAMS), []
    for step in range(steps):
        updates, state = tx.update(gradient(step), state, PARAMS, **extra_args)
        given.append(updates)
    return given, state


def test_at_one_size_it_is_optaxs():
    ours, _ = along(scale_by_adam(HALF_LIFE, b1=0.8), 30, count=SIZE)
    theirs, _ = along(optax.scale_by_adam(0.8, B2), 30)
    for one, other in zip(ours, theirs, strict=True):
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in PARAMS.items()}
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-5)
        np.testing.assert_allclose(
            *(u["half"].astype(jnp.float32) for u in (one, other)), rtol=0.05
        )


def test_two_batches_are_remembered_as_one_of_both():
    tx = scale_by_adam(half_life=100)
    _, twice = along(tx, 1, count=40)
    for count in (40, 0):
        _, twice = tx.update(gradient(0), twice, PARAMS, count=count)
    _, once = along(tx, 1, count=80)
    np.testing.assert_allclose(twice.weight, 1 - 2 ** (-80 / 100), rtol=1e-6)
    np.testing.assert_allclose(twice.weight, once.weight, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), twice.nu, once.nu)
    assert (twice.step, once.step) == (2, 1)


def test_a_long_half_life_loses_no_digits():
    _, state = along(scale_by_adam(half_life=1e9), 1, count=1)
    assert state.weight == pytest.approx(math.log(2) * 1e-9, rel=1e-6)


def test_an_empty_batch_is_no_step():
    tx = scale_by_adam(half_life=100)
    _, before = along(tx, 3, count=8)
    updates, after = jax.jit(tx.update)(gradient(3), before, PARAMS, count=0)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not any(np.asarray(u, np.float32).any() for u in jax.tree.leaves(updates))
    first, _ = tx.update(gradient(0), tx.init(PARAMS), PARAMS, count=0)
    assert all(np.isfinite(np.asarray(u, np.float32)).all() for u in jax.tree.leaves(first))


def test_moments_tell_the_number_of_examples():
    moments = cabs_jax.GradientMoments(jnp.float32(1), gradient(0), jnp.float32(1), jnp.int32(SIZE))
    tx = scale_by_adam(HALF_LIFE)
    told, counted = (
        tx.update(gradient(0), tx.init(PARAMS), PARAMS, **given)[1]
        for given in ({"moments": moments}, {"count": SIZE})
    )
    jax.tree.map(np.testing.assert_array_equal, told, counted)


@pytest.mark.slow
def test_cabs_adam_at_one_size_is_that_of_its_b2():
    def loss_fn(w, example):
        return (w @ example[:3] - example[3]) ** 2

    def train(**memory):
        tx = cabs_adam(0.05, min_batch_size=SIZE, max_batch_size=SIZE, **memory)
        moments_of = jax.jit(cabs_jax.gradient_moments(loss_fn, variance="diagonal"))
        w = jnp.zeros(3)
        state, raw = tx.init(w), []
        for step in range(20):
            batch = jax.random.normal(jax.random.key(step), (SIZE, 4))
            m = moments_of(w, batch)
            updates, state = tx.update(m.mean, state, w, moments=m)
            w = optax.apply_updates(w, updates)
            raw.append(cabs_jax.info(state).raw_batch_size)
        return w, np.array(raw)

    expected, by_examples = train(b2=B2), train(half_life=HALF_LIFE)
    for one, other in zip(by_examples, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_mistakes_are_told():
    for arguments, name in (
        ({"half_life": 0}, "half_life"),
        ({"half_life": 10, "b1": 1.0}, "b1"),
        ({"half_life": 10, "eps": -1.0}, "eps"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            scale_by_adam(**arguments)
    with pytest.raises(ValueError, match="half_life must be a positive number, got -1"):
        cabs_adam(0.1, half_life=-1)
    tx = scale_by_adam(10)
    with pytest.raises(ValueError, match="scale_by_adam goes by the number of examples"):
        tx.update(gradient(0), tx.init(PARAMS), PARAMS)
