"""What every data set looks like once loaded, and what makes none."""

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets.dataset import make_dataset


@pytest.mark.parametrize("name", ["mnits", "no/such/folder"])
def test_an_unknown_name_lists_the_known_ones(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"unknown data set '{name}': choose one of digits, digits_noisy"
    ):
        datasets.load(name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((np.zeros((2, 4, 4, 1)), np.zeros(2, int)), "must be uint8"),
        ((np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)), "must be uint8"),
        ((np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, int)), "holds no pixels"),
        ((np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int)), "2 images but labels of shape"),
        ((np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1])), "label -1 is outside"),
        ((np.zeros((2, 4, 4, 1), np.uint8), np.array([3, 0])), "label 3 is outside"),
        ((np.zeros((2, 5, 4, 1), np.uint8), np.zeros(2, int)), "training images are"),
    ],
)
def test_arrays_that_do_not_make_a_data_set_are_refused(train, message):
    test = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int)
    with pytest.raises(ValueError, match=message):
        make_dataset("toy", train, test, ("a", "b", "c"))
