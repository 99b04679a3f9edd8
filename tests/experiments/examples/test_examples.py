"""Each example trains, and its batch size moves; `main` gives (losses, batch sizes)."""

from itertools import pairwise

import numpy as np
import pytest
from sklearn.datasets import load_digits

import cabs_jax
from experiments.examples import grain_dataset, language_model, plain_jax

pytestmark = pytest.mark.slow  # trains every example until its loss has fallen

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES, LABELS = (IMAGES / 16).astype(np.float32), LABELS.astype(np.int32)


def check(losses, sizes, below=0.5):
    assert len(losses) == len(sizes)
    assert np.mean(losses[-10:]) < below * np.mean(losses[:10])
    assert sizes[0] == min(sizes) < sizes[-1]


def test_the_loss_falls_and_the_batch_grows():
    check(*plain_jax.main(140))


class Torch:
    """A map-style data set of torch: records one at a time, a pair with a tensor in it."""

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.array, dtype)

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"image": self.Tensor(IMAGES[index]), "label": self.Tensor(LABELS[index])}


class HuggingFace:
    """A data set of Hugging Face: many records at a time, vectors as lists."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        raise AssertionError("one call for each record is slow: __getitems__ is there")

    def __getitems__(self, indices):
        assert all(type(index) is int for index in indices)
        return [{"image": IMAGES[i].tolist(), "label": int(LABELS[i])} for i in indices]


@pytest.mark.filterwarnings("ignore:the batches hold")  # lists of floats, as the library gives them
@pytest.mark.parametrize("dataset", [None, Torch(), HuggingFace()], ids=["grain", "torch", "hf"])
def test_data_sets_of_other_libraries_are_sources(dataset):
    check(*grain_dataset.main(40, dataset))


def test_the_language_model_learns_and_its_batch_follows_the_noise_scale(tmp_path):
    history = language_model.main(40, sizes=(2, 4))
    sizes = [step.batch_size for step in history]
    check([step.loss - 2 for step in history], sizes, below=0.6)  # so few bytes leave it noisy
    for before, after in pairwise(history):
        assert 0.7 < after.batch_size / np.clip(before.noise_scale, 2, 4) < 1.5
    language_model.plot(history, tmp_path / "noise_scale.png")
    assert (tmp_path / "noise_scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_language_model_holds_no_gradient_of_a_single_sequence(capsys):
    params = language_model.init(language_model.jax.random.key(0))
    rows = cabs_jax.explain(language_model.loss_fn, params, language_model.read_sequences(1)[0])
    assert "per example" not in capsys.readouterr().out
    assert {row.form for row in rows} <= {"Gram", "direct", "small"}
