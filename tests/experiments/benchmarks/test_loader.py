"""The slow sources of the benchmark are what their names say, and threads are measured."""

import numpy as np
import pytest

pytest.importorskip("grain")

from experiments.benchmarks import loader


def test_slow_sources():
    wait, decode = loader.slow_sources().values()
    assert loader.read_alone(wait, 0.05) <= 1 / loader.WAIT
    image = decode()
    assert image.shape == (224, 224, 3)
    assert image.dtype == np.uint8


@pytest.mark.slow
def test_a_row_for_each_source_and_number_of_threads(capsys):
    loader.slow_records(0.02, (1, 2))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [(int(row[-3]), float(row[-1])) for row in rows if row and row[-1][-1].isdigit()]
    assert [threads for threads, _ in numbers] == [1, 2, 1, 2]
    assert all(ratio > 0 for _, ratio in numbers)
