"""Global arrays on a mesh, read once by whichever process holds them."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cabs_jax import BatchLoader, buckets
from cabs_jax.loader.placement import Placement, placement
from tests import processes

MESHES = {"8": ((8,), ("data",)), "4 x 2": ((4, 2), ("data", "model"))}


def mesh_of(name, kind=AxisType.Auto):
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def source(kind):
    arrays = {"x": np.arange(200.0, dtype=np.float32).reshape(50, 4), "y": np.arange(50)}
    if kind == "arrays":
        return arrays
    return [{"x": x, "y": y} for x, y in zip(arrays["x"], arrays["y"], strict=True)]


@pytest.mark.parametrize("kind", ["arrays", "records"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MESHES)
def test_a_sharded_batch_is_the_plain_one_spread_over_the_mesh(kind, axis_type, name):
    sharding = NamedSharding(mesh_of(name, axis_type), P("data"))
    with (
        BatchLoader(source(kind), seed=1, sharding=sharding) as sharded,
        BatchLoader(source(kind), seed=1) as plain,
    ):
        for size in (8, 64, 16):
            sharded.batch_size = plain.batch_size = size
            batch, expected = next(sharded), next(plain)
            assert batch["x"].sharding == sharding
            rows = size // sharding.mesh.shape["data"]
            assert batch["x"].addressable_data(0).shape == (rows, 4)
            jax.tree.map(np.testing.assert_array_equal, batch, expected)


def test_axes_that_together_split_the_batch():
    sharding = NamedSharding(mesh_of("4 x 2"), P(("data", "model")))
    batch = next(BatchLoader(np.arange(50), 16, sharding=sharding))
    assert batch.addressable_data(0).shape == (2,)


@pytest.mark.parametrize("spec", [P(), P(None)])
def test_a_replicated_batch_may_have_any_size(spec):
    sharding = NamedSharding(mesh_of("8"), spec)
    assert next(BatchLoader(np.arange(50), 7, sharding=sharding)).addressable_data(3).shape == (7,)


def test_a_single_device_is_a_sharding_too():
    device = jax.devices()[3]
    batch = next(BatchLoader(np.arange(50), 7, sharding=SingleDeviceSharding(device)))
    assert batch.devices() == {device}


def test_padded_batches_are_sharded_with_their_mask():
    sharding = NamedSharding(mesh_of("8"), P("data"))
    loader = BatchLoader(source("arrays"), 19, sharding=sharding, pad_to=buckets(8, 64))
    batch, mask = next(loader)
    assert batch["x"].shape == (24, 4)
    assert mask.sharding == sharding
    np.testing.assert_array_equal(mask, np.arange(24) < 19)


def test_a_size_that_cannot_be_split_raises_and_says_what_to_do():
    sharding = NamedSharding(mesh_of("8"), P("data"))
    loader = BatchLoader(np.arange(50), 12, sharding=sharding)
    with pytest.raises(ValueError, match=r"batch size 12 .* 8 shards: .*round_to=8.*pad_to"):
        next(loader)
    loader.batch_size = 16
    assert loader.get_state()["position"] == 0
    assert len(next(loader)) == 16


def test_buckets_that_cannot_be_split_raise():
    sharding = NamedSharding(mesh_of("8"), P("data"))
    with pytest.raises(ValueError, match=r"multiples of the 8 shards .* got \(16, 20\)"):
        BatchLoader(np.arange(50), sharding=sharding, pad_to=(16, 20))
    with pytest.raises(ValueError, match="a multiple of the 8 shards of the batch, got 20"):
        next(BatchLoader(np.arange(50), sharding=sharding, pad_to=lambda size: 20))


@pytest.mark.parametrize(
    ("sharding", "error"),
    [
        (lambda mesh: P("data"), TypeError),
        (lambda mesh: mesh, TypeError),
        (lambda mesh: NamedSharding(mesh, P("data", "model")), ValueError),
    ],
)
def test_what_does_not_shard_the_leading_axis_alone_raises(sharding, error):
    with pytest.raises(error, match="sharding must"):
        BatchLoader(np.zeros((50, 4)), sharding=sharding(mesh_of("4 x 2")))


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def placement_of(monkeypatch, process, shards_of_processes, shards):
    """The placement on `process` when processes hold the given shards, one device for each."""
    devices = {
        Device(owner): (slice(shard, shard + 1),)
        for owner, share in enumerate(shards_of_processes)
        for shard in share
    }
    sharding = SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(
        SingleDeviceSharding, "device_set", property(lambda self: set(range(shards)))
    )
    monkeypatch.setattr(SingleDeviceSharding, "devices_indices_map", lambda self, shape: devices)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return placement(sharding)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([[0, 1], [2, 3]], [Placement(4, 2, 0), Placement(4, 2, 1)]),
        ([[2, 3], [0, 1]], [Placement(4, 2, 1), Placement(4, 2, 0)]),
        ([[0, 2], [1, 3]], [Placement(4, 2, 0), Placement(4, 2, 1)]),
        ([[0], [1], [0], [1]], [Placement(2, 2, 0), Placement(2, 2, 1)] * 2),
        ([[0, 1], [0, 1]], [Placement(2, 1, 0)] * 2),
    ],
)
def test_every_process_reads_its_own_share(monkeypatch, shares, expected):
    shards = max(max(share) for share in shares) + 1
    for process, value in enumerate(expected):
        with monkeypatch.context() as patch:
            assert placement_of(patch, process, shares, shards) == value


@pytest.mark.parametrize("shares", [[[0, 1], [1, 2]], [[0, 1, 2], [3]]])
def test_shares_that_overlap_or_differ_in_size_raise(monkeypatch, shares):
    with pytest.raises(ValueError, match="order the mesh by process"):
        placement_of(monkeypatch, 0, shares, 4)


def test_a_process_without_a_share_raises(monkeypatch):
    with pytest.raises(ValueError, match="no device of process 2"):
        placement_of(monkeypatch, 2, [[0], [1]], 2)


def loaders_of(readers, length, **kwargs):
    """The loaders of several processes, which yield local rows for want of a sharding."""
    loaders = []
    for reader in range(readers):
        with pytest.MonkeyPatch.context() as patch:
            share = Placement(readers, readers, reader)
            here = BatchLoader.__init__.__globals__
            patch.setitem(here, "placement", lambda sharding, share=share: share)
            loaders.append(BatchLoader(np.arange(length), seed=5, **kwargs))
    return loaders


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    readers=st.integers(1, 5),
    length=st.integers(1, 30),
    sizes=st.lists(st.integers(5, 60), min_size=1, max_size=6),
)
def test_shares_of_every_batch_make_up_the_batch(readers, length, sizes):
    loaders = loaders_of(readers, length, pad_to=lambda size: -(-size // readers) * readers)
    plain = BatchLoader(np.arange(length), seed=5)
    for size in sizes:
        real = []
        for loader in (*loaders, plain):
            loader.batch_size = size
        for loader in loaders:
            rows, mask = next(loader)
            assert len(rows) == len(mask) == -(-size // readers)
            real.extend(rows[mask].tolist())
            assert loader.get_state()["position"] == plain.get_state()["position"] + size
        assert sorted(real) == sorted(next(plain).tolist())


def test_a_batch_smaller_than_the_number_of_processes_raises():
    for loader in loaders_of(3, 10, batch_size=2, pad_to=3):
        with pytest.raises(
            ValueError, match=r"size 2 leaves some of 3 processes .*min_batch_size=3"
        ):
            next(loader)


def read_with(count, name, requests):
    """What each of so many processes of two devices sees, in a row for each request."""
    started = processes.start(pathlib.Path(__file__).with_name(name), count, requests)
    return list(zip(*processes.results(started), strict=True))


LENGTH = 1000  # more than is read, so that an example read twice is an error
SHARED = [
    {"kind": kind, "length": LENGTH, "sizes": sizes, "pad_to": pad_to}
    for kind in ("arrays", "records")
    for sizes, pad_to in (([8, 12, 4, 40], None), ([8, 13, 3, 41], [4, 16, 64]))
]


def left_by_one_process():
    plain = BatchLoader(np.arange(LENGTH), 7, seed=3)
    next(plain)
    return plain


@pytest.fixture(scope="module")
def seen_together():
    state = left_by_one_process().get_state()
    return read_with(2, "read_as_process.py", [{**case, "state": state} for case in SHARED])


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(SHARED)), ids=lambda case: str([*SHARED[case].values()]))
def test_two_processes_share_the_stream_that_one_process_left_and_takes_up_again(
    seen_together, case
):
    results, plain = seen_together[case], left_by_one_process()
    kind, _, sizes, _ = SHARED[case].values()
    expected = []
    for size in sizes:
        plain.batch_size = size
        expected.append(sorted(next(plain).tolist()))

    for result in results:
        assert result["batches"] == results[0]["batches"]
        assert result["state"] == plain.get_state()
    assert [sorted(batch) for batch in results[0]["batches"]] == expected
    first, second = ([set(local) for local in result["local"]] for result in results)
    for a, b, batch in zip(first, second, expected, strict=True):
        assert not a & b
        assert a | b == set(batch)
    if kind == "records":
        reads = results[0]["read"] + results[1]["read"]
        assert len(set(reads)) == len(reads)
        assert set(np.concatenate(expected).tolist()) <= set(reads)

    resumed = BatchLoader(np.arange(LENGTH), 5, seed=3)
    resumed.set_state(results[1]["state"])
    resumed.batch_size = plain.batch_size = 5
    np.testing.assert_array_equal(next(resumed), next(plain))


UNEVEN = [[40, 40], [30, 3], [5, 41]]
UNEVEN_SIZES = [8, 13, 3, 20] + [9] * 12
ENDLESS_SIZES = [8, 13, 3, 20, 16, 31]


@pytest.fixture(scope="module")
def streams_seen():
    once = {"sizes": UNEVEN_SIZES, "epochs": 1, "fails": None}
    requests = [{**once, "lengths": lengths} for lengths in UNEVEN]
    requests += [{**once, "lengths": [10, 7], "sizes": ENDLESS_SIZES, "epochs": None}]
    requests += [{**once, "lengths": [30, 9], "sizes": [8] * 10, "fails": 1}]
    return read_with(2, "stream_as_process.py", requests)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(UNEVEN)), ids=lambda case: str(UNEVEN[case]))
def test_processes_with_streams_of_their_own_agree_on_sizes_and_on_the_end(streams_seen, case):
    results, lengths, sizes = streams_seen[case], UNEVEN[case], UNEVEN_SIZES
    for result in results:
        assert result["error"] is None
        assert result == results[0]
        assert result["examples_seen"] == sum(lengths)
    batches = results[0]["batches"] + results[0]["resumed"]
    assert batches.pop() is None
    batches = [batch for batch in batches if batch is not None]
    assert all(len(batch) <= size for batch, size in zip(batches, sizes, strict=False))
    own = [list(range(1000 * process, 1000 * process + n)) for process, n in enumerate(lengths)]
    examples = np.concatenate(batches)
    np.testing.assert_array_equal(examples[examples < 1000], own[0])
    np.testing.assert_array_equal(examples[examples >= 1000], own[1])


@pytest.mark.slow
def test_endless_streams_of_processes_repeat_each_on_its_own(streams_seen):
    results, sizes = streams_seen[-2], ENDLESS_SIZES
    batches = results[0]["batches"] + results[0]["resumed"]
    assert list(map(len, batches)) == sizes
    examples = np.concatenate(batches)
    for process, length in enumerate((10, 7)):
        own = examples[examples // 1000 == process] - 1000 * process
        np.testing.assert_array_equal(own, np.arange(len(own)) % length)


@pytest.mark.slow
def test_a_stream_that_fails_on_one_process_ends_the_others_too(streams_seen):
    first, second = streams_seen[-1]
    assert "stream of another process failed" in first["error"]
    assert second["error"] == "bad sector"
