import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from cabs_jax import BatchLoader, CompiledStep, buckets

SIZES = buckets(16, 2048)
STREAM = np.random.default_rng(0).normal(size=500).astype(np.float32)


def step(state, batch, mask):
    mean = jnp.sum(jnp.where(mask, batch, 0)) / jnp.sum(mask)
    return state + 0.1 * (mean - state), mean


def compiled_step(function=step, sizes=SIZES, **options):
    return CompiledStep(function, sizes, batch_argnums=(1, 2), **options)


def run(function, sizes):
    loader = BatchLoader(STREAM, pad_to=SIZES)
    state, means = jnp.zeros(()), []
    for loader.batch_size in sizes:
        state, mean = function(state, *next(loader))
        means.append(mean)
    return np.array(means)


def args_of(size, state=0.0):
    return jnp.asarray(state), np.ones(size, np.float32), np.ones(size, bool)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(16, 2048), min_size=1, max_size=12))
def test_any_sizes_compile_at_most_one_executable_a_bucket_and_change_no_result(sizes):
    expected = run(jax.jit(step), sizes)
    with compiled_step() as ahead, compiled_step(sizes=()) as on_demand:
        np.testing.assert_array_equal(run(ahead, sizes), expected)
        np.testing.assert_array_equal(run(on_demand, sizes), expected)
    assert ahead.compilations <= len(SIZES) <= 16
    assert on_demand.compilations == len({min(b for b in SIZES if b >= m) for m in sizes})
    assert on_demand.seconds_in_background == 0


def test_each_executable_is_traced_once():
    traces = []

    def counted(*args):
        traces.append(args[1].shape)
        return step(*args)

    with compiled_step(counted) as compiled:
        run(compiled, [16, 2048, 100, 16, 17, 2048, 100])
    assert len(traces) == len(set(traces)) == compiled.compilations


def test_the_next_larger_batch_size_is_compiled_in_another_thread_without_being_asked_for():
    traced = {}
    done = threading.Event()

    def noted(*args):
        traced[len(args[1])] = threading.current_thread()
        if len(args[1]) == 24:
            done.set()
        return step(*args)

    with compiled_step(noted, (16, 24, 32)) as compiled:
        compiled(*args_of(16))
        assert done.wait(60)
    assert traced[16] is threading.main_thread() is not traced[24]
    assert set(traced) == {16, 24}
    assert compiled.seconds_in_background > 0
    waited = compiled.seconds_waited
    compiled(*args_of(16))
    assert compiled.seconds_waited == waited > 0
    compiled(*args_of(24))
    assert set(traced) == {16, 24}


@pytest.mark.slow
def test_a_call_waits_for_the_compilation_that_is_under_way():
    proceed, tracing = threading.Event(), threading.Event()

    def slow(*args):
        if len(args[1]) == 24:
            tracing.set()
            assert proceed.wait(60)
        return step(*args)

    with compiled_step(slow, (16, 24)) as compiled:
        compiled(*args_of(16))
        assert tracing.wait(60)
        before = compiled.seconds_waited
        threading.Timer(0.2, proceed.set).start()
        compiled(*args_of(24))
    assert compiled.seconds_waited - before > 0.1
    assert compiled.compilations == 2


def test_an_error_in_the_background_is_raised_by_the_call_that_needs_the_executable():
    def fails_at_24(*args):
        if len(args[1]) == 24:
            raise RuntimeError("no step for 24")
        return step(*args)

    with compiled_step(fails_at_24, (16, 24, 32)) as compiled:
        compiled(*args_of(16))
        compiled(*args_of(16))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no step for 24"):
                compiled(*args_of(24))
        compiled(*args_of(32))
    assert compiled.compilations == 2


def test_other_kinds_of_arguments_get_executables_of_their_own():
    with compiled_step(sizes=()) as compiled:
        for state in (0.0, np.zeros(3, np.float16), 0.0, jnp.zeros(3)):
            state, _ = compiled(state, *args_of(16)[1:])
        assert state.shape == (3,)
        assert compiled.compilations == 3


def test_donation_and_jitted_steps_pass_through():
    for donating in (
        compiled_step(donate_argnums=0),
        compiled_step(jax.jit(step, donate_argnums=0)),
    ):
        with donating as compiled:
            args = args_of(16)
            compiled(*args)
            assert args[0].is_deleted()


def test_the_background_has_the_mesh_and_settings_of_the_caller():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    seen = []

    def noted(state, batch):
        seen.append((jax.sharding.get_abstract_mesh(), jax.config.jax_default_matmul_precision))
        return state + jnp.mean(batch)

    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        state = jax.device_put(jnp.zeros(()), NamedSharding(mesh, PartitionSpec()))
        with CompiledStep(noted, (16, 24), batch_argnums=1) as compiled:
            for size in (16, 16, 24):
                state = compiled(state, jax.device_put(np.ones(size, np.float32), split))
        assert state == 3
    assert seen == [(mesh.abstract_mesh, "float32")] * 2
    assert compiled.compilations == 2


def test_a_closed_step_still_runs():
    compiled = compiled_step(sizes=(16, 24))
    compiled.close()
    compiled(*args_of(16))
    assert compiled.compilations == 1


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match="function of arrays, got 3"):
        CompiledStep(3)
    with pytest.raises(ValueError, match=r"increasing and positive, got \(16, 16\)"):
        CompiledStep(step, (16, 16))
    with compiled_step(lambda *args: 0) as compiled, pytest.raises(ValueError, match="leading"):
        compiled(0.0, np.ones(3), np.ones(4))


def test_executables_ahead_are_for_the_device_of_the_calling_thread():
    other = jax.devices()[1]
    with jax.default_device(other), compiled_step() as compiled:
        for size in SIZES[:3]:
            state, _ = compiled(*args_of(size))
            assert state.devices() == {other}
    assert compiled.compilations <= 4


def test_another_setting_is_another_executable():
    with compiled_step(sizes=()) as compiled:
        compiled(*args_of(16))
        with jax.default_matmul_precision("float32"):
            compiled(*args_of(16))
            compiled(*args_of(16))
        compiled(*args_of(16))
        assert compiled.compilations == 2
