"""The programs of the pages of examples, before and after: both train, and few lines change."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import cabs_jax

FOLDER = Path(__file__).parents[3] / ".github" / "docs" / "examples"
OPTIONAL = {"datasets", "equinox", "grain", "haiku", "keras", "torch"}
CONVERSIONS = {
    name: (page, diff)
    for page in sorted(FOLDER.glob("*.md"))
    for name, diff in re.findall(
        r"^## ([^\n]*)\n(?:(?!^## ).)*?^```diff\n(.*?)^```", page.read_text("utf-8"), re.S | re.M
    )
}


def side(diff, sign):
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


@pytest.mark.every_case
@pytest.mark.slow  # compiles a step of every library, and again for every batch size
@pytest.mark.filterwarnings("ignore:::(keras|haiku|datasets|torch|multiprocessing|pyarrow)")
@pytest.mark.parametrize(
    "sign",
    [pytest.param("-", id="before", marks=pytest.mark.exhaustive), pytest.param("+", id="after")],
)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_both_programs_train(name, sign, monkeypatch):
    page, diff = CONVERSIONS[name]
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # before the import
    for library in re.findall(r"^(?:import|from) (\w+)", side(diff, sign), re.M):
        if library in OPTIONAL:
            pytest.importorskip(library)
    program = {}
    shared = re.search(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)[1]
    with jax.numpy_rank_promotion("allow"):  # Keras promotes
        exec(shared, program)
        exec(side(diff, sign), program)
    losses, loader = program["losses"], program["loader"]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    if isinstance(loader, cabs_jax.BatchLoader):
        loader.close()
        assert loader.batch_size > 8, "the batch has not grown"


def test_the_table_counts_the_lines():
    table = (FOLDER / "index.md").read_text("utf-8")
    stated = dict(re.findall(r"^\| \[([^]]+)\]\S+ \| (\d+) \|", table, re.M))
    counted = {name: len(re.findall(r"^\+.", d, re.M)) for name, (_, d) in CONVERSIONS.items()}
    assert {name: int(lines) for name, lines in stated.items()} == counted


def test_the_three_lines_are_three():
    _, diff = CONVERSIONS["Equinox"]
    step = diff[diff.index("def train_step") :]
    assert len(re.findall(r"^\+ +\S", step, re.M)) == 3
