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
        "image": rng.integers(0, 256, (23, 2, 2, 1), dtype=np.uint8),
        "label": rng.integers(0, 3, 23, dtype=np.int32),
    }
    logits = predict(params, split["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split["label"])

    for batch_size in (5, 23, 100):
        result = make_evaluate(predict, batch_size)(params, split)
        np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-5)
        assert result.accuracy == np.mean(logits.argmax(-1) == split["label"])
