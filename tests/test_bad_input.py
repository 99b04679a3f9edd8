"""What a user may get wrong, and the message that says so: one row a mistake.

Data files have tables of their own, next to the tests of what they should hold: truncated, swapped
and corrupted ones, lying headers, archives that point outside of themselves, checksums that differ
and downloads without a network are in tests/experiments/datasets/; plans of sweeps in
test_plan.py; damaged checkpoints and other configurations in test_checkpoint.py; sizes that do not
fit a mesh in tests/cabs_jax/loader/test_sharding.py.
"""

import json
import math
import os
import resource

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cabs_jax
from cabs_jax import BatchLoader
from experiments import cli, datasets
from experiments.commands import run
from experiments.training import run_folder as records
from experiments.training.config import RunConfig

PARAMS = jnp.zeros(3)
BATCH = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}
ARRAYS = {"x": np.arange(10.0)}


def loss_fn(params, example):
    return (params @ example["x"] - example["y"]) ** 2


class Records:
    """Ten records, the eighth of which is made by `bad`."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.bad() if index == 7 else {"x": np.zeros(3, np.float32)}


def read(bad):
    with BatchLoader(Records(bad), 4, shuffle=False) as loader:
        for _ in range(3):
            next(loader)


def fail():
    raise OSError("the disk is gone")


def resize(size):
    loader = BatchLoader(ARRAYS, 2)
    loader.batch_size = size
    next(loader)


def moments(loss=loss_fn, batch=BATCH, mask=None, of=cabs_jax.gradient_moments):
    return of(loss)(PARAMS, batch) if mask is None else of(loss)(PARAMS, batch, mask=mask)


def update(grads=PARAMS, value=1.0, gradient_variance=1.0, **kwargs):
    optimizer = cabs_jax.cabs(0.1)
    state = optimizer.init(PARAMS)
    optimizer.update(
        grads, state, PARAMS, value=value, gradient_variance=gradient_variance, **kwargs
    )


def per_example(loss):
    return moments(loss, of=cabs_jax.per_example_value_and_grad)


def dataset(images, labels):
    split = (np.asarray(images), np.asarray(labels))
    return datasets.dataset.make_dataset("mine", split, split, ("a", "b"))


IMAGES = np.zeros((2, 4, 4, 1), np.uint8)

COMPLEX = jnp.ones(3, jnp.complex64)


def complex_update():
    optimizer = cabs_jax.cabs(0.1)
    optimizer.update(COMPLEX, optimizer.init(COMPLEX), COMPLEX, value=1.0, gradient_variance=1.0)


TABLE = {
    # parameters
    "complex moments": (
        lambda: cabs_jax.gradient_moments(loss_fn)(COMPLEX, BATCH),
        TypeError,
        "dtype complex64: hold the real and imaginary parts",
    ),
    "complex gradients": (
        lambda: cabs_jax.per_example_value_and_grad(loss_fn)(COMPLEX, BATCH),
        TypeError,
        "dtype complex64: hold the real and imaginary parts",
    ),
    "complex update": (complex_update, TypeError, "dtype complex64: hold the real"),
    "a rate of -1 with momentum": (
        lambda: cabs_jax.cabs(-1.0, momentum=0.9),
        ValueError,
        "learning_rate must be .* got -1.0",
    ),
    "a rate of text with momentum": (
        lambda: cabs_jax.cabs("0.1", momentum=0.9),
        ValueError,
        "learning_rate must be .* got '0.1'",
    ),
    "numbers for a batch": (
        lambda: moments(batch={"x": np.ones((2, 3)), "y": 1.0}),
        ValueError,
        "same leading example axis",
    ),
    # sizes
    "zero": (lambda: resize(0), ValueError, r"batch_size must be in \[1, 16777216\], got 0"),
    "negative": (lambda: resize(-3), ValueError, r"in \[1, 16777216\], got -3"),
    "huge": (lambda: resize(2**40), ValueError, r"in \[1, 16777216\], got 1099511627776"),
    "nan": (lambda: resize(math.nan), TypeError, "batch_size must be an integer, got nan"),
    "float": (lambda: resize(2.5), TypeError, "batch_size must be an integer, got 2.5"),
    "text": (lambda: resize("8"), TypeError, "batch_size must be an integer, got '8'"),
    "bool": (lambda: resize(True), ValueError, r"in \[1, 16777216\], got True"),
    "zero on the device": (lambda: resize(jnp.int32(0)), ValueError, r"in \[1, .*got Array\(0"),
    "float on the device": (lambda: resize(jnp.float32(4)), TypeError, "scalar, got float32"),
    "several": (lambda: resize(jnp.ones(2, int)), TypeError, r"integer scalar, got int32\[2\]"),
    # sources
    "no arrays": (lambda: BatchLoader({"x": np.zeros((0, 3))}), ValueError, "holds no examples"),
    "no records": (lambda: BatchLoader([]), ValueError, "source holds no examples"),
    "lengths": (
        lambda: BatchLoader({"x": np.zeros(3), "y": np.zeros(4)}),
        ValueError,
        r"share their leading axis, got shapes \[\(3,\), \(4,\)\]",
    ),
    "scalar": (lambda: BatchLoader({"x": np.float32(1)}), ValueError, r"got shapes \[\(\)\]"),
    "name": (lambda: BatchLoader("mnist"), TypeError, "source must be .* got str"),
    "number": (lambda: BatchLoader(3), TypeError, "source must be .* got int"),
    "raises": (lambda: read(fail), OSError, "the disk is gone"),
    "ragged": (
        lambda: read(lambda: {"x": np.zeros(4, np.float32)}),
        ValueError,
        r"records differ in shape: \[\(3,\), \(4,\)\]",
    ),
    "dtypes": (
        lambda: read(lambda: {"x": np.zeros(3)}),
        ValueError,
        r"records differ in dtype: \['float32', 'float64'\]",
    ),
    "keys": (lambda: read(lambda: {"y": np.zeros(3)}), ValueError, "records differ in structure"),
    "nothing": (lambda: read(lambda: None), ValueError, "records differ in structure"),
    "only nothing": (
        lambda: next(BatchLoader([None, None], 2)),
        ValueError,
        "records hold no values, got None",
    ),
    "jagged list": (
        lambda: next(BatchLoader([{"x": [1, [2, 3]]}], 1)),
        ValueError,
        "a list in a record is not a rectangular array",
    ),
    "state of a loader": (
        lambda: BatchLoader(ARRAYS).set_state({"position": 3}),
        ValueError,
        r"state lacks \['length', 'seed', 'shuffle'\]",
    ),
    # losses and batches
    "vector": (
        lambda: moments(lambda params, example: params * example["x"]),
        TypeError,
        r"must return one floating-point scalar per example; it returned shape \(3,\)",
    ),
    "vector, path a": (
        lambda: per_example(lambda params, example: params * example["x"]),
        TypeError,
        r"must return one floating-point scalar per example; it returned shape \(3,\)",
    ),
    "integer": (
        lambda: moments(lambda params, example: jnp.int32(1)),
        TypeError,
        "floating-point scalar per example; .* dtype int32",
    ),
    "leading axes": (
        lambda: moments(batch={**BATCH, "y": jnp.ones(5)}),
        ValueError,
        r"needs the same leading example axis; .*'x'.*: 4, .*'y'.*: 5",
    ),
    "rank": (
        lambda: moments(batch={**BATCH, "y": jnp.float32(1)}),
        ValueError,
        r"needs the same leading example axis; .*'y'.*: None",
    ),
    "length of the mask": (
        lambda: moments(mask=jnp.ones(3, bool)),
        ValueError,
        r"mask must have shape \(4,\) like the batch, got \(3,\)",
    ),
    "dtype of the mask": (
        lambda: moments(mask=jnp.ones(4)),
        TypeError,
        "mask must be a boolean array, got float32",
    ),
    # updates
    "no loss": (lambda: update(value=None), ValueError, "update got value=None: pass moments="),
    "losses with a mean gradient": (
        lambda: update(value=jnp.ones(4)),
        ValueError,
        r"value must be the mean loss, a scalar, .* got shape \(4,\)",
    ),
    "gradient of another shape": (
        lambda: update(jnp.ones(5)),
        ValueError,
        r"gradient has shape \(5,\) and its parameter \(3,\)",
    ),
    "gradient of another tree": (
        lambda: update({"w": PARAMS}),
        ValueError,
        "the gradients must be a tree like the parameters",
    ),
    "count": (
        lambda: update(count=jnp.ones(2)),
        ValueError,
        r"count must be an integer scalar, got dtype float32, shape \(2,\)",
    ),
    "state of no optimizer": (
        lambda: cabs_jax.batch_size({"a": jnp.ones(2)}),
        ValueError,
        "no batch size in this state",
    ),
    # data
    "dtype of images": (
        lambda: dataset(IMAGES.astype(float), [0, 1]),
        ValueError,
        r"images must be uint8 \(n, height, width, channels\), got float64",
    ),
    "rank of images": (
        lambda: dataset(IMAGES[..., 0], [0, 1]),
        ValueError,
        r"images must be uint8 .* got uint8 \(2, 4, 4\)",
    ),
    "label out of range": (
        lambda: dataset(IMAGES, [0, 2]),
        ValueError,
        r"mine, train split: label 2 is outside \[0, 2\)",
    ),
    "negative label": (lambda: dataset(IMAGES, [0, -1]), ValueError, "label -1 is outside"),
    "labels missing": (lambda: dataset(IMAGES, [0]), ValueError, r"2 images but labels of shape"),
    # configurations
    "learning rate": (
        lambda: RunConfig(learning_rate=math.nan),
        ValueError,
        "learning_rate must be a positive number, got nan",
    ),
    "steps": (lambda: RunConfig(steps=0), ValueError, "steps must be at least 1, got 0"),
}


@pytest.mark.parametrize(("mistake", "error", "message"), TABLE.values(), ids=TABLE.keys())
def test_a_mistake_is_told(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()


@pytest.mark.slow
def test_nan_in_the_images_changes_neither_sizes_nor_averages_and_is_seen_in_the_state():
    optimizer = cabs_jax.cabs(0.1)
    state = optimizer.init(PARAMS)
    for poison in (jnp.nan, jnp.inf):
        m = moments(batch={**BATCH, "x": BATCH["x"].at[2, 1].set(poison)})
        updates, after = optimizer.update(
            m.mean, state, PARAMS, value=m.value, gradient_variance=m.variance, count=m.count
        )
        assert not all(np.isfinite(updates))
        assert after.info.non_finite == 1
        assert after.batch_size == state.batch_size
        assert after.value_average == state.value_average
        assert after.gradient_variance_average == state.gradient_variance_average


@pytest.mark.slow  # trains
def test_a_label_that_does_not_exist_poisons_the_loss_rather_than_the_training():
    def cross_entropy(params, example):
        return optax.softmax_cross_entropy_with_integer_labels(params, example)

    m = cabs_jax.gradient_moments(cross_entropy)(PARAMS, jnp.array([0, 1, 3]))
    assert np.isnan(m.value)


CONFIG = json.loads(json.dumps(RunConfig(steps=3).__dict__))


def resume_with(folder, text, capsys):
    (folder / records.CONFIG).write_text(text)
    status = cli.main(["run", "--resume", "--out", str(folder)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": 3', "config.json is damaged"),
        ("[3]", "config.json is damaged: it holds no JSON object"),
        (json.dumps({**CONFIG, "momenta": 1}), "config.json holds an unknown key: momenta"),
        (json.dumps({**CONFIG, "steps": "3"}), "config.json holds '3' as steps"),
        (json.dumps({**CONFIG, "method": ["cabs"]}), "config.json holds ['cabs'] as method"),
        (json.dumps({**CONFIG, "lag": -1}), "lag must not be negative, got -1"),
    ],
)
def test_a_damaged_configuration_of_a_run_is_told_in_one_line(tmp_path, capsys, text, message):
    status, told = resume_with(tmp_path, text, capsys)
    assert (status, told.count("\n")) == (2, 1)
    assert message in told
    assert (tmp_path / records.CONFIG).read_text() == text


json_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([1])
)


@settings(max_examples=40, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*CONFIG, "new"]), json_values, max_size=4))
def test_a_configuration_of_any_values_is_a_run_or_a_clear_error(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / records.CONFIG).write_text(json.dumps({**CONFIG, **changes}))
    try:
        config = RunConfig(**run.stored_options(folder, {}))
    except ValueError:
        return
    assert config.limit[1] >= 1


@pytest.fixture
def at_most_a_kilobyte_a_file():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("at_most_a_kilobyte_a_file")
def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path):
    path, written = tmp_path / records.METRICS, 0
    line = {"step": 1, "loss": 0.25}
    with records.Lines(path) as lines:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):  # noqa: PT012
            for _ in range(1000):
                lines.write(line)
                written += 1
        assert written > 10
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line] * written
    summary = tmp_path / records.SUMMARY
    records.write_json(summary, line)
    with pytest.raises(OSError, match=f"File too large: '{summary}'"):
        records.write_json(summary, {"text": "x" * 2000})
    assert json.loads(summary.read_text()) == line
    assert sorted(os.listdir(tmp_path)) == [records.METRICS, records.SUMMARY]


@pytest.mark.parametrize("out", ["/proc/run", "{tmp_path}/file/run"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, capsys, out):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "--steps", "1", "--out", out.format(tmp_path=tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
