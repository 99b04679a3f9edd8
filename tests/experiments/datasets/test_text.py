"""Texts as sequences of bytes and what follows each of them."""

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import text


def test_every_byte_is_followed_by_its_label_and_the_end_is_held_out(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, 40 * text.LENGTH + 60, dtype=np.uint8)
    (tmp_path / "some.txt").write_bytes(codes.tobytes())
    loaded = datasets.load("some.txt", data_dir=tmp_path)
    assert loaded.name == "some.txt"
    assert loaded.num_classes == 256
    assert loaded.input_shape == (text.LENGTH,)
    splits = loaded.train, loaded.test
    assert [len(split["input"]) for split in splits] == [38, 2]
    inputs, labels = (
        np.concatenate([split[key].ravel() for split in splits]) for key in ("input", "label")
    )
    np.testing.assert_array_equal(inputs, codes[: len(inputs)])
    np.testing.assert_array_equal(labels, codes[1 : len(inputs) + 1])
    assert (inputs.dtype, labels.dtype) == (np.uint8, np.int32)


def test_a_text_that_is_too_short_is_told(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 500)
    with pytest.raises(ValueError, match="500 bytes are too short, at least 2561 are needed"):
        datasets.load(path)


@pytest.mark.slow
def test_the_standard_library_is_a_text_of_millions_of_bytes():
    loaded = datasets.load("python")
    assert loaded.train["input"].size > 3_000_000
    assert datasets.fingerprint(loaded) == datasets.fingerprint(datasets.load("python"))
    assert b"import " in loaded.train["input"][:100].tobytes()
