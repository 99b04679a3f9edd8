import numpy as np
import pytest

from experiments import report
from experiments.report import analysis, figures, page, results, statistics, verdicts
from experiments.report.results import Results
from experiments.sweeps import plan
from tests.experiments.measured import finished, method

INFINITY = float("inf")


def test_the_target_is_crossed_on_the_line_between_logarithms():
    examples, loss = np.array([0.0, 100.0, 200.0]), np.array([4.0, 2.0, 0.5])
    assert statistics.crossing(examples, loss, 1.0) == pytest.approx(150)
    assert statistics.crossing(examples, loss, 5.0) == 0
    assert statistics.crossing(examples, loss, 0.4) == INFINITY
    assert statistics.crossing(examples, np.array([4.0, np.nan, np.nan]), 1.0) == INFINITY


def test_decades_count_the_part_of_the_grid_that_is_good_enough():
    rates = [0.01, 0.1, 1.0]
    assert statistics.decades_within(rates, [1.0, 1.0, 1.0], 1.0) == pytest.approx(2)
    assert statistics.decades_within(rates, [4.0, 1.0, 4.0], 2.0) == pytest.approx(1)
    assert statistics.decades_within(rates, [2.0, 1.0, INFINITY], 2.0) == pytest.approx(1)
    assert statistics.decades_within(rates, [3.0, 3.0, 3.0], 2.0) == 0


def test_a_spread_counts_what_is_not_there_as_infinite():
    assert statistics.spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert statistics.spread([1.0, 2.0]) == (1.5, 1.0, 2.0)
    assert statistics.spread([1.0, float("nan"), INFINITY]) == (INFINITY, 1.0, INFINITY)


def data_set(*methods, target=0.1):
    return analysis.DataSet("data", "Data", {m.title: m for m in methods}, target, 0.1, 1)


GOOD, FAIR = {0.1: 0.01, 0.2: 0.01, 0.4: 0.01}, {0.1: 0.1, 0.2: 0.5, 0.4: 0.5}


def answers(*methods):
    found = verdicts.verdicts([data_set(*methods)])
    return {v.question.name: v.overall for v in found}


@pytest.mark.parametrize(
    ("cabs", "other", "expected"),
    [
        (GOOD, FAIR, ["confirmed", "confirmed", "confirmed"]),
        (FAIR, GOOD, ["not confirmed", "not confirmed", "partly"]),
        (GOOD, GOOD, ["not confirmed", "not confirmed", "confirmed"]),
    ],
)
def test_verdicts_follow_from_the_numbers(cabs, other, expected):
    found = answers(
        method("cabs", cabs, sizes=24), method("constant", other), method("norm_test", other, 64)
    )
    assert [found["RQ1"], found["RQ3"], found["RQ4"]] == expected
    assert found["RQ2"] == "no data"


def test_where_there_is_no_data_it_says_what_to_add_to_the_plan():
    data = data_set(method("cabs", {0.1: 0.05}, 24), method("constant", {0.1: 0.05}))
    found = {v.question.name: v for v in verdicts.verdicts([data])}
    assert "a decreasing rate" in found["RQ2"].advice
    assert "3 learning_rates or more" in found["RQ3"].advice
    assert "another adaptive size" in found["RQ4"].advice
    assert not found["RQ1"].advice


def test_sensitivity_is_undecided_where_no_loss_is_far_from_the_first():
    high = {0.1: 0.6, 0.2: 0.7, 0.4: 0.8}
    data = data_set(method("cabs", high), method("constant", high))
    found = {v.question.name: v for v in verdicts.verdicts([data])}["RQ3"]
    assert [answer.verdict for answer in found.answers.values()] == ["undecided"]
    assert found.overall == "undecided"


def test_a_run_that_kept_the_size_of_a_constant_one_is_not_compared_with_it():
    assert answers(method("cabs", GOOD, 16), method("constant", FAIR, 16))["RQ1"] == "undecided"


def test_a_difference_within_what_seeds_do_does_not_count():
    constant = method("constant", {0.1: 0.05}, spread=(0.8, 1.0, 1.2))
    for spread, expected in (((0.6, 0.6, 0.6), "confirmed"), ((0.1, 0.6, 0.9), "not confirmed")):
        assert answers(method("cabs", {0.1: 0.05}, 24, spread=spread), constant)["RQ1"] == expected


def test_fewer_than_three_rates_say_nothing_of_sensitivity():
    two = {0.1: 0.01, 0.2: 0.02}
    assert answers(method("cabs", two, 24), method("constant", two))["RQ3"] == "no data"


def test_a_seed_with_missing_runs_is_left_out_once_one_is_whole():
    text = """
        seeds = [0, 1]
        learning_rates = [0.1, 0.2]
        [datasets.digits]
        [methods.constant]
        """
    parsed = plan.parse(text)
    (run, *_) = method("constant", {0.1: 0.5}).by_rate[0.1]
    finished = {planned.name: run._replace(run=planned) for planned in parsed.runs}
    (data,) = analysis.data_sets(Results(text, parsed, finished))
    assert data.seeds == 2
    del finished["digits/constant/lr-0.2-seed-1"]
    (data,) = analysis.data_sets(Results(text, parsed, finished))
    assert (data.seeds, data.methods["constant"].rates) == (1, [0.1, 0.2])
    del finished["digits/constant/lr-0.2-seed-0"]
    (data,) = analysis.data_sets(Results(text, parsed, finished))
    assert (data.seeds, data.methods["constant"].rates) == (2, [0.1])


def test_where_all_runs_diverged_there_is_a_figure_and_no_rate_is_good():
    lost = method("cabs", {0.1: INFINITY, 0.2: INFINITY})
    assert figures.sensitivity(data_set(lost)).startswith(b"\x89PNG")
    assert analysis.decades(lost) == 0


def test_the_fastest_rate_need_not_be_the_best():
    found = method("cabs", {0.1: 0.05, 0.2: 0.04, 0.4: 3.0})
    found.by_rate[0.2][0].train_loss[1] = 0.9  # slow at first
    assert (found.best_rate, found.fastest_rate(0.1)) == (0.2, 0.1)
    assert found.fastest_rate(0.01) == found.best_rate


def test_decreasing_rates_decide_the_second_question():
    constant, cosine = method("constant", FAIR), method("constant", GOOD, 32, schedule="cosine")
    for losses, expected in ((GOOD, "confirmed"), (FAIR, "not confirmed"), ({0.1: 0.05}, "partly")):
        data = data_set(method("cabs", losses), constant, cosine)
        found = {v.question.name: v.overall for v in verdicts.verdicts([data])}
        assert found["RQ2"] == expected


def test_a_step_of_a_size_between_two_that_were_measured_costs_what_lies_between():
    costs = analysis.Costs([])
    assert np.isnan(costs.step(16))
    measured = method("cabs", GOOD, sizes=16).by_rate[0.1] + method("cabs", GOOD, 64).by_rate[0.1]
    costs = analysis.Costs(measured)
    assert costs.step(40) == pytest.approx(0.040)
    assert costs.step(128) == pytest.approx(0.128)
    assert costs.of({16: 2, 64: 1}) == pytest.approx(0.096)


def test_the_figures_come_before_the_criteria_and_the_page_is_one_file(tmp_path):
    source = tmp_path / "results.jsonl"
    results.save(finished(), source)
    markdown, page_path, _ = report.write(source, tmp_path / "out")
    text = markdown.read_text()
    assert text.rindex("](figures/") < text.index("## How the verdicts follow")
    assert {path.name for path in page_path.parent.iterdir()} == {
        "report.md",
        "report.html",
        "results.jsonl",
        "figures",
    }
    assert page_path.read_text().count('src="data:image/png;base64,') == 2
    assert 'src="figures' not in page_path.read_text()


@pytest.mark.slow  # draws two figures each
@pytest.mark.parametrize(
    "methods",
    [
        [method("cabs_momentum", GOOD), method("constant", GOOD, schedule="cosine")],
        [method("cabs", dict.fromkeys(GOOD, INFINITY))],
        [method("norm_test", dict.fromkeys(GOOD, 0.0))],
    ],
)
def test_a_sweep_of_any_methods_has_a_report(methods):
    loaded = finished()
    runs = [r for m in methods for rate in m.rates for r in m.by_rate[rate]]
    named = {r.run.name: r._replace(run=r.run._replace(dataset="digits")) for r in runs}
    titles = {m.label: m.title for m in methods}
    parsed = loaded.plan._replace(methods=titles, runs=tuple(r.run for r in named.values()))
    sections = page.sections(Results("", parsed, named))
    assert [len(section.figures) for section in sections if section.figures] == [2]


def test_a_compact_file_keeps_averaged_weights_and_what_was_not_measured(tmp_path):
    kept = finished()
    nan = np.nan
    thinned = {
        name: run._replace(
            averaged={"exponential": (np.array([1.0, 0.6, 0.25]), np.array([nan, nan, 0.75]))},
            test_accuracy=np.array([nan, nan, 0.5]),
            variance=np.arange(40.0),
        )
        for name, run in kept.runs.items()
    }
    results.save(kept._replace(runs=thinned), tmp_path / "results.jsonl")
    for run in results.load(tmp_path / "results.jsonl").runs.values():
        losses, accuracies = run.averaged["exponential"]
        np.testing.assert_array_equal(losses, [1.0, 0.6, 0.25])
        np.testing.assert_array_equal(accuracies, [nan, nan, 0.75])
        np.testing.assert_array_equal(run.test_accuracy, [nan, nan, 0.5])
        np.testing.assert_array_equal(run.variance, np.arange(40.0))
