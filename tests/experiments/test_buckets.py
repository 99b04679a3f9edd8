import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.buckets import bucket_of, buckets, pad


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 3000))
def test_buckets_are_few_increasing_and_hold_every_size(smallest, extra):
    legal = buckets(smallest, smallest + extra)
    assert len(legal) <= 16
    assert legal == tuple(sorted(set(legal)))
    assert (legal[0], legal[-1]) == (smallest, smallest + extra)
    for size in {smallest, smallest + extra // 2, smallest + extra}:
        bucket = bucket_of(size, legal)
        assert bucket >= size
        assert not any(size <= other < bucket for other in legal)


def test_padding_wastes_at_most_15_percent_for_sizes_uniform_in_log():
    sizes = np.geomspace(16, 2048, 2000).round().astype(int)
    padded = [bucket_of(size, buckets(16, 2048)) for size in sizes]
    assert 1 - sizes.sum() / sum(padded) <= 0.15


def test_pad_appends_zeros_and_marks_the_real_examples():
    batch = {"image": np.full((3, 2, 2, 1), 7, np.uint8), "label": np.array([1, 2, 3], np.int32)}
    padded, mask = pad(batch, 5)
    assert mask.tolist() == [True, True, True, False, False]
    assert padded["label"].tolist() == [1, 2, 3, 0, 0]
    assert padded["image"].dtype == np.uint8
    np.testing.assert_array_equal(padded["image"][:3], batch["image"])
    assert not padded["image"][3:].any()


def test_pad_refuses_to_cut():
    with pytest.raises(ValueError, match="could not broadcast"):
        pad({"label": np.zeros(4)}, 3)
