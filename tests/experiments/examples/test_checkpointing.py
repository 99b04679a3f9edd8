import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

import cabs_jax
from experiments.examples import checkpointing


@pytest.mark.slow
def test_a_loop_of_ones_own_goes_on_from_its_checkpoint(tmp_path):
    whole = checkpointing.train(tmp_path / "whole", 40)
    first = checkpointing.train(tmp_path / "cut", 26)
    second = checkpointing.train(tmp_path / "cut", 40)
    assert first == whole[:26]
    assert second == whole[20:]


def test_grain_saves_and_restores_a_loader(tmp_path):
    def start():
        return cabs_jax.BatchLoader(np.arange(100), 7, seed=3)

    loader, expected = start(), start()
    for batches in (loader, expected):
        next(batches)
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        item = checkpointing.GrainIterator(loader)
        checkpoints.save(1, args=ocp.args.Composite(loader=grain.checkpoint.CheckpointSave(item)))
        checkpoints.wait_until_finished()
        fresh = start()
        item = checkpointing.GrainIterator(fresh)
        checkpoints.restore(
            1, args=ocp.args.Composite(loader=grain.checkpoint.CheckpointRestore(item))
        )
    np.testing.assert_array_equal(next(fresh), next(expected))
