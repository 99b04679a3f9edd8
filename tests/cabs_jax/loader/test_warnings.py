"""What JAX would convert or cannot take is said once."""

import warnings

import jax
import numpy as np
import pytest

from cabs_jax import BatchLoader


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": {"x": np.zeros(9)}}, r"values\['a'\]\['x'\] of float64, which JAX rounds"),
        ([{"x": 0.5}] * 9, r"values\['x'\] of float64"),
        ({"name": np.array(["one"] * 9)}, r"values\['name'\] of <U3, which JAX has no type for"),
        ([{"name": "one"}] * 9, r"\['name'\] of <U3"),
        (np.array(["one"] * 9, object), "values of object, which JAX has no type for"),
    ],
)
def test_values_that_do_not_reach_the_device_warn_once(source, message):
    with BatchLoader(source, 4) as loader:
        with pytest.warns(UserWarning, match=message) as told:
            next(loader)
        assert len(told) == 1
        assert told[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            next(loader)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, bool])
def test_what_is_usual_does_not_warn(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(BatchLoader(np.zeros(9, dtype)))


def test_float64_does_not_warn_where_jax_computes_in_it():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        next(BatchLoader(np.zeros(9)))
