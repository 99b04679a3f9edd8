import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cli
from experiments.commands import sweep as command
from experiments.report import results
from experiments.sweeps import plan, sweep
from tests.experiments.measured import finished

TEXT = """
title = "Two by two"
notes = ["Small."]
examples = 100
learning_rates = [0.1, 0.4]
seeds = [0, 1]

[datasets.digits]
[datasets.small]
title = "small digits"
dataset = "digits"
width = 0.5
methods = ["cabs"]
seeds = [1]

[methods.cabs]
[methods.big]
title = "constant 64"
method = "constant"
batch_size = 64
learning_rate_factor = 3
"""


def test_every_combination_is_a_run_with_the_innermost_option():
    parsed = plan.parse(TEXT)
    by_name = {run.name: run.config for run in parsed.runs}
    assert len(by_name) == len(parsed.runs) == 2 * 2 * 2 + 2
    big = by_name["digits/big/lr-0.4-seed-1"]
    assert (big.method, big.batch_size, big.learning_rate, big.seed) == ("constant", 64, 1.2, 1)
    assert big.examples == 100
    small = by_name["small/cabs/lr-0.1-seed-1"]
    assert (small.dataset, small.method, small.width) == ("digits", "cabs", 0.5)
    assert (parsed.title, parsed.notes) == ("Two by two", ("Small.",))
    assert parsed.datasets == {"digits": "digits", "small": "small digits"}
    assert parsed.methods == {"cabs": "cabs", "big": "constant 64"}


def test_the_first_seed_of_everything_comes_first():
    seeds = [run.config.seed for run in plan.parse(TEXT).runs]
    assert seeds == sorted(seeds)
    assert plan.parse(TEXT).runs[1].method == "big"


@given(st.integers(1, 12))
@settings(deadline=None, max_examples=12)
def test_shards_share_the_runs_out(count):
    runs = plan.parse(TEXT).runs
    shards = [plan.shard(runs, index, count) for index in range(1, count + 1)]
    assert sorted(run.name for shard in shards for run in shard) == sorted(r.name for r in runs)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("index", "count"), [(0, 2), (3, 2), (1, 0)])
def test_there_is_no_other_shard(index, count):
    with pytest.raises(plan.PlanError, match=f"got {index}/{count}"):
        plan.shard(plan.parse(TEXT).runs, index, count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("examples = 100", "exampels = 100"), "unknown key 'exampels' in the sweep; known keys"),
        (("width", "widht"), "unknown key 'widht' in datasets.small"),
        (("batch_size", "batchsize"), "unknown key 'batchsize' in methods.big"),
        (("examples = 100", "seed = 1"), "unknown key 'seed' in the sweep; give seeds, a list"),
        (("[0.1, 0.4]", "0.1"), "learning_rates of .* must be a list .* got 0.1"),
        (("[0.1, 0.4]", "[0.1, 0.1]"), "a list of different numbers"),
        (("[0.1, 0.4]", "[-0.1]"), "datasets.digits with methods.cabs: learning_rate must be"),
        (("seeds = [1]", "seeds = [1.5]"), "seeds of .* got .1.5."),
        (("learning_rates = [0.1, 0.4]", ""), "learning_rates of .* got None"),
        (('"constant"', '"constnat"'), "unknown method 'constnat'; known methods: "),
        (('["cabs"]', '["cab"]'), "datasets.small asks for 'cab', but there is no such method"),
        (("width = 0.5", 'model = "lenet"'), "unknown model 'lenet'; known models: "),
        (("width = 0.5", 'width = "half"'), "datasets.small with methods.cabs: "),
        (("examples = 100", "examples = "), "no TOML: "),
        (('["Small."]', "[1]"), "a note must be a str, got 1"),
        (("[datasets.small]", '[datasets."../small"]'), "names a folder: use letters, digits"),
        (("[datasets.digits]\n[datasets.small]", "[methods.small]"), "no .datasets.NAME"),
    ],
)
def test_a_mistake_in_the_plan_is_named(change, message):
    assert change[0] in TEXT
    with pytest.raises(plan.PlanError, match=message):
        plan.parse(TEXT.replace(*change))


def test_runs_that_a_compact_file_holds_are_not_made_again(tmp_path, monkeypatch, capsys):
    asked = []

    def swept(text, runs, out, **options):
        asked.append([run.name for run in runs])
        return sweep.Outcome(0, len(runs), 0, {}, {})

    monkeypatch.setattr(command, "sweep", swept)
    made = finished()
    names = list(made.runs)
    lacking = made._replace(runs={name: made.runs[name] for name in names[1:]})
    results.save(lacking, tmp_path / "known.jsonl")
    (tmp_path / "plan.toml").write_text(made.plan_text)
    given = ["sweep", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")]
    known = ["--known", str(tmp_path / "known.jsonl")]
    assert cli.main([*given, *known]) == 0
    assert f"{len(names) - 1} were there already" in " ".join(capsys.readouterr().out.split())
    # A run of another configuration is another run, whatever its name.
    (tmp_path / "plan.toml").write_text(made.plan_text.replace("1440", "2880"))
    assert cli.main([*given, *known]) == 0
    assert asked == [names[:1], names]
