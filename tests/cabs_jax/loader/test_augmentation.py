"""Random transformations differ from epoch to epoch, while each example comes once in each."""

import grain
import numpy as np
import pytest

from cabs_jax import BatchLoader


def jittered(shuffled=False):
    dataset = grain.MapDataset.range(20).seed(3)
    if shuffled:
        dataset = dataset.shuffle()
    return dataset.random_map(lambda index, rng: {"index": index, "crop": rng.integers(2**40)})


class Augmented:
    """Takes the epoch, which other sources are not told."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        raise AssertionError("record is there to be used")

    def record(self, index, epoch):
        assert (type(index), type(epoch)) == (int, int)
        return {"index": index, "crop": 1000 * epoch + index}


def epochs_of(source, count=3, **kwargs):
    with BatchLoader(source, 20, **kwargs) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("source", [jittered, lambda: jittered(shuffled=True), Augmented])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_epoch_repeats_the_crops_of_another(source, shuffle):
    epochs = epochs_of(source(), shuffle=shuffle)
    for epoch in epochs:
        assert sorted(epoch["index"].tolist()) == list(range(20))
    crops = np.concatenate([epoch["crop"] for epoch in epochs])
    assert len(set(crops.tolist())) == 60


def test_resuming_and_threads_change_no_crop():
    plain = epochs_of(jittered())
    for batch, again in zip(plain, epochs_of(jittered(), num_threads=4), strict=True):
        np.testing.assert_equal(again, batch)
    with BatchLoader(jittered(), 20) as loader:
        loader.set_state(loader.get_state() | {"position": 40})
        np.testing.assert_equal(next(loader), plain[2])


def test_the_epoch_is_that_of_the_example_where_a_batch_spans_two():
    with BatchLoader(Augmented(), 50, shuffle=False) as loader:
        crops = next(loader)["crop"]
    np.testing.assert_array_equal(crops // 1000, [0] * 20 + [1] * 20 + [2] * 10)


def test_a_grain_data_set_that_is_endless_already_is_refused():
    with pytest.raises(ValueError, match="Repeating already infinite"):
        BatchLoader(jittered().repeat())
