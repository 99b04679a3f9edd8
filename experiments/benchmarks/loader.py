"""Examples per second of `BatchLoader`: beside numpy and Grain, and of slow records by threads."""

import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cabs_jax import BatchLoader
from experiments.benchmarks import _timing

BATCH_SIZES = (16, 128, 2048)
THREADS = (1, 2, 4, 8, 16)
WAIT = 0.005  # seconds for a record
OURS = "cabs_jax"


class Examples(NamedTuple):
    """A data set in memory, or a batch of it."""

    image: np.ndarray
    label: np.ndarray


class Rates(NamedTuple):
    """Median examples per second of each contender, and medians of paired ratios."""

    examples_per_second: dict[str, float]
    over_numpy: float
    over_grain: float


def main(*, rounds: int = 15, seconds: float = 0.1, slow_seconds: float = 2.0) -> None:
    """Prints the tables.

    Args:
      rounds: Paired measurements of each cell.
      seconds: Length of a measurement.
      slow_seconds: Length of a measurement of slow records.
    """
    arrays_in_memory(rounds, seconds)
    slow_records(slow_seconds)


def arrays_in_memory(rounds: int, seconds: float) -> None:
    """Prints a row for each data set and batch size."""
    table = Table(box=SIMPLE_HEAD, title="examples per second")
    for column in ("data", "m", *contenders(data_sets()["MNIST"], 16), "/ numpy", "/ Grain"):
        table.add_column(column, justify="left" if column == "data" else "right")
    cells = list(itertools.product(data_sets().items(), BATCH_SIZES))
    for (name, examples), batch_size in track(cells, "bench loader", transient=True):
        result = measure(examples, batch_size, rounds, seconds)
        table.add_row(
            name,
            str(batch_size),
            *(f"{rate:,.0f}" for rate in result.examples_per_second.values()),
            f"{result.over_numpy:.2f}",
            f"{result.over_grain:.1f}",
        )
    Console().print(table)


def slow_records(seconds: float, threads: tuple[int, ...] = THREADS) -> None:
    """Prints a row for each source and number of threads, at the smallest batch size."""
    table = Table(box=SIMPLE_HEAD, title="slow records")
    for column in ("records", "threads", "examples per second", "/ threads alone"):
        table.add_column(column, justify="left" if column == "records" else "right")
    cells = list(itertools.product(slow_sources().items(), threads))
    for (name, read), number in track(cells, "bench loader", transient=True):
        one = read_alone(read, seconds)
        speed = read_by_threads(read, number, seconds)
        table.add_row(name, str(number), f"{speed:,.0f}", f"{speed / one / number:.2f}")
    Console().print(table)


class Slow:
    """Endlessly many records, each of which takes its time."""

    def __init__(self, read: Callable[[], np.ndarray]):
        self._read = read

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> np.ndarray:
        return self._read()


def slow_sources() -> dict[str, Callable[[], np.ndarray]]:
    """Ways to read one record: waiting, as for a network, and computing."""
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (28, 28, 3), np.uint8)).resize((500, 375))
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=90)
    encoded = file.getvalue()

    def wait() -> np.ndarray:
        time.sleep(WAIT)
        return np.zeros((), np.int32)

    def decode() -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(encoded)).resize((224, 224)))

    return {f"{1000 * WAIT:.0f} ms of waiting": wait, "JPEG of 500 x 375": decode}


def read_alone(read: Callable[[], np.ndarray], seconds: float) -> float:
    """Records per second in this thread."""
    return rate((read() for _ in itertools.count()), seconds)


def read_by_threads(read: Callable[[], np.ndarray], threads: int, seconds: float) -> float:
    """Examples per second of a loader, once it runs."""
    size = BATCH_SIZES[0]
    with BatchLoader(Slow(read), size, num_threads=threads) as loader:
        for _ in range(-(-4 * threads // size)):  # so that what was read ahead is used up
            next(loader)
        return rate(loader, seconds) * size


def data_sets() -> dict[str, Examples]:
    """Random examples of the shapes, types and numbers of MNIST and CIFAR-10."""
    random = np.random.default_rng(0)
    return {
        "MNIST": Examples(
            random.random((60_000, 28, 28, 1), np.float32), random.integers(0, 10, 60_000, np.int32)
        ),
        "CIFAR-10": Examples(
            random.integers(0, 256, (50_000, 32, 32, 3), np.uint8),
            random.integers(0, 10, 50_000, np.int32),
        ),
    }


def contenders(examples: Examples, batch_size: int) -> dict[str, Iterator[Any]]:
    """Endless iterators over shuffled batches.

    Grain is read in this thread: the global interpreter lock makes its reading threads slower.
    """
    dataset = grain.MapDataset.source(Rows(examples)).seed(0).shuffle().repeat().batch(batch_size)
    return {
        "numpy": by_hand(examples, batch_size),
        OURS: BatchLoader(examples, batch_size),
        "Grain": (dataset[i] for i in itertools.count()),
    }


def by_hand(examples: Examples, batch_size: int) -> Iterator[Examples]:
    """What one writes without a library: a permutation per epoch, and fancy indexing."""
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(examples.label))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            indices = order[start : start + batch_size]
            yield Examples(examples.image[indices], examples.label[indices])


class Rows:
    """Arrays as a source of single examples, which is what Grain reads."""

    def __init__(self, examples: Examples):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples.label)

    def __getitem__(self, index: int) -> Examples:
        return Examples(self._examples.image[index], self._examples.label[index])


def measure(examples: Examples, batch_size: int, rounds: int, seconds: float) -> Rates:
    """Times all contenders in turn, `rounds` times, after one untimed turn."""
    iterators = contenders(examples, batch_size)
    rates: dict[str, list[float]] = {name: [] for name in iterators}
    for turn in range(rounds + 1):
        for name, iterator in iterators.items():
            batches_per_second = rate(iterator, seconds)
            if turn:
                rates[name].append(batches_per_second * batch_size)
    return Rates(
        {name: statistics.median(values) for name, values in rates.items()},
        _timing.median_ratio(rates[OURS], rates["numpy"]),
        _timing.median_ratio(rates[OURS], rates["Grain"]),
    )


def rate(iterator: Iterator[Any], seconds: float) -> float:
    """Items per second, over at least `seconds`."""
    started = time.perf_counter()
    count, elapsed = 0, 0.0
    while elapsed < seconds:
        next(iterator)
        count += 1
        elapsed = time.perf_counter() - started
    return count / elapsed
