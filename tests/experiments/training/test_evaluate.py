import numpy as np
import optax
import pytest

from experiments.training.evaluate import make_evaluate


def predict(params, images):
    return images.reshape(len(images), -1).astype("float32") @ params


@pytest.mark.slow
def test_the_last_partial_batch_counts_only_its_real_examples():
    rng = np.random.default_rng(0)
    params = rng.normal(size=(4, 3)).astype(np.float32) / 100
    split = {
        "input": rng.integers(0, 256, (23, 2, 2, 1), dtype=np.uint8),
        "label": rng.integers(0, 3, 23, dtype=np.int32),
    }
    logits = predict(params, split["input"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split["label"])

    for batch_size in (5, 23, 100):
        result = make_evaluate(predict, batch_size)(params, split)
        np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-5)
        assert result.accuracy == np.mean(logits.argmax(-1) == split["label"])


@pytest.mark.slow
def test_a_sequence_counts_by_its_mean():
    params = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    inputs = np.array([[0, 1], [2, 3], [1, 1]], np.uint8)
    split = {"input": inputs, "label": np.array([[0, 1], [2, 0], [1, 2]], np.int32)}
    result = make_evaluate(lambda table, codes: table[codes], 2)(params, split)
    losses = optax.softmax_cross_entropy_with_integer_labels(params[inputs], split["label"])
    np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-5)
    found = params[inputs].argmax(-1) == split["label"]
    np.testing.assert_allclose(result.accuracy, found.mean(), rtol=1e-6)
