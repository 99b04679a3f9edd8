"""A user's type checker knows what comes back."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

import cabs_jax

USER = """
from typing import Any, assert_type

import jax
from cabs_jax import GradientMoments, WeightSums, gradient_moments, per_example_value_and_grad

def loss_fn(params: Any, example: Any) -> jax.Array:
    return jax.numpy.sum(params * example)

def with_aux(params: Any, example: Any) -> tuple[jax.Array, Any]:
    return loss_fn(params, example), example

params, batch = jax.numpy.ones(3), jax.numpy.ones((8, 3))
m = gradient_moments(loss_fn)(params, batch)
assert_type(m, GradientMoments)
assert_type(gradient_moments(loss_fn)(params, batch, rng=jax.random.key(0)), GradientMoments)
assert_type(m.value, jax.Array)
assert_type(m.count, jax.Array)
some = gradient_moments(loss_fn, variance="diagonal", subsample=4)
assert_type(some(params, batch, mask=None), GradientMoments)
both = gradient_moments(with_aux, has_aux=True, method="between", groups=2)
assert_type(both(params, batch), tuple[GradientMoments, Any])
assert_type(per_example_value_and_grad(loss_fn)(params, batch), tuple[jax.Array, Any])
each = per_example_value_and_grad(with_aux, has_aux=True, axis_name="data")
assert_type(each(params, batch), tuple[tuple[jax.Array, Any], Any])
weighted = gradient_moments(loss_fn)(params, batch, weights=jax.numpy.ones(8))
assert_type(weighted, GradientMoments)
assert_type(weighted.weights, WeightSums | None)
assert_type(m, int)  # wrong
gradient_moments(loss_fn, variance="full")  # wrong
gradient_moments(loss_fn, microbatch=4)  # wrong
per_example_value_and_grad(loss_fn, axes="data")  # wrong
gradient_moments(loss_fn)(params, batch, key=jax.random.key(0))  # wrong
m.variances  # wrong
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_a_type_checker_knows_what_the_moments_are(tmp_path, request):
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "user.py"]
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    command += ["--cache-dir", str(cache.mkdir("mypy") if cache else tmp_path / "mypy")]
    environment = os.environ | {"MYPYPATH": str(pathlib.Path(cabs_jax.__file__).parents[1])}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    wrong = {i for i, line in enumerate(USER.splitlines(), 1) if line.endswith("# wrong")}
    found = {int(number) for number in re.findall(r"^user\.py:(\d+): error", run.stdout, re.M)}
    assert found == wrong, run.stdout + run.stderr
