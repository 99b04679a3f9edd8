import json

from experiments.benchmarks.ahead_of_time import check, table
from experiments.benchmarks.ahead_of_time.costs import Costs, Hot
from experiments.benchmarks.ahead_of_time.targets import tpu


def cells(**ratios):
    plain = Costs(
        1e-3, 0.0, 10, 1000, 5000, {}, 2000, 1.0, [Hot(1e-3, 1, "f (fusion)", "")], {"add": 1e-3}
    )
    dearer = {name: getattr(plain, name) * ratio for name, ratio in ratios.items()}
    return [
        table.Cell("v5e:1x1", "mlp", 128, "plain", plain),
        table.Cell("v5e:1x1", "mlp", 128, "trace", plain._replace(**dearer)),
    ]


def test_a_ratio_that_rose_by_more_than_a_tenth_fails_and_is_named():
    outcome = check.compare(cells(seconds=1.5), cells(seconds=1.3))
    assert not outcome.passed
    assert "v5e:1x1 mlp 128 trace: time 1.30× → 1.50×" in outcome.text


def test_ratios_that_fell_or_rose_a_little_pass():
    outcome = check.compare(cells(seconds=1.4, memory_bytes=0.5), cells(seconds=1.3))
    assert outcome.passed


def test_a_file_without_these_programs_fails():
    assert not check.compare(cells(), []).passed


def test_cells_survive_json():
    for cell in cells(seconds=2.0):
        assert table.Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_the_table_shows_multiples_of_the_plain_step():
    text = table.table(cells(seconds=2.0, temporary_bytes=3.0), tpu("v5e:1x1"))
    plain, trace = text.splitlines()[2:]
    assert "1.5 M" in plain
    assert "2.00×" in trace
    assert "3.00×" in trace


def test_the_operations_that_cost_more_than_in_the_plain_step_are_named():
    plain, trace = cells(seconds=1.5)
    trace = trace._replace(costs=trace.costs._replace(operations={"add": 1e-3, "slice": 5e-4}))
    assert "over plain: slice +0.50\n" in table.hottest([plain, trace], 5)
