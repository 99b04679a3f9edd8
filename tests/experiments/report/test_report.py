"""Results put together, judged and told, from studies made up."""

import numpy as np
import pytest

from experiments import cli, report
from experiments.report import analysis, page, results, statistics, tables
from experiments.sweeps import plan
from tests.experiments.measured import UNTRAINED, finished, measured, result

TEXT = """
    learning_rates = [0.1, 0.2, 0.4]
    seeds = [0, 1]
    examples = 1440
    [datasets.cifar10]
    title = "Data"
    model = "cifar10_2c3d"
    [methods.cabs]
    title = "CABS"
    [methods.constant-16]
    method = "constant"
    [methods.constant-128]
    method = "constant"
    batch_size = 128
    """


def loss_of(run):
    """The method's best rate is 0.2, CABS's best of all."""
    ours = {"cabs": 0.5, "constant-16": 0.7, "constant-128": 0.9}[run.method]
    return ours * (1 if run.learning_rate == 0.2 else 1.2) * (1 + 0.01 * run.config.seed)


def told(run):
    size = {"cabs": 32, "constant-16": 16, "constant-128": 128}[run.method]
    averaged = (0.8 * loss_of(run), 0.9 * loss_of(run))
    return {"loss": loss_of(run), "averaged": averaged, "size": size, "variance": 64.0}


def data_of(*parts, clock=()):
    (data,) = analysis.data_sets(parts, analysis.Clock(clock))
    return data


def test_the_target_is_crossed_on_the_line_between_logarithms():
    examples, loss = np.array([0.0, 100.0, 200.0]), np.array([4.0, 2.0, 0.5])
    assert statistics.crossing(examples, loss, 1.0) == pytest.approx(150)
    assert statistics.crossing(examples, loss, 5.0) == 0
    assert statistics.crossing(examples, loss, 0.4) == float("inf")
    assert statistics.crossing(examples, np.array([4.0, np.nan, np.nan]), 1.0) == float("inf")


def test_runs_of_several_machines_are_put_together_where_they_are_the_same():
    here = measured(TEXT, lambda run: told(run) if run.config.seed == 0 else None)
    there = measured(TEXT, lambda run: told(run) | {"accuracy": 0.25})
    longer = measured(TEXT.replace("1440", "2880"), told)
    both = results.merged(here, longer, there)
    assert both.missing == []
    assert {r.run.config.examples for r in both.runs.values()} == {1440}
    from_there = [r.run.config.seed for r in both.runs.values() if r.test_accuracy[-1] == 0.25]
    assert set(from_there) == {1}
    assert list(both.runs) == [run.name for run in both.plan.runs]


def test_folders_and_files_of_one_plan_make_one_part_and_one_compact_file(tmp_path):
    halves = [
        measured(TEXT, lambda run, seed=seed: told(run) if run.config.seed == seed else None)
        for seed in (0, 1)
    ]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for half, path in zip(halves, paths, strict=True):
        results.save(half, path)
    (part,) = report.load(paths)
    assert part.missing == []
    compact = tmp_path / "new" / "c.jsonl"
    assert cli.main(["report", *map(str, paths), "--compact", str(compact)]) == 0
    assert results.load(compact).runs.keys() == part.runs.keys()


@pytest.mark.parametrize("arguments", [[], ["there"], ["--out", "x"]])
def test_a_report_needs_a_sweep_and_something_to_write(arguments, capsys):
    assert cli.main(["report", *arguments]) == 2
    assert "give a sweep, and --out, --compact or --next" in capsys.readouterr().err


def test_the_final_loss_is_the_median_of_three_and_untrained_where_it_diverged():
    (run, *_) = plan.parse(TEXT).runs
    lucky = result(run, 0.5)
    lucky.train_loss[-3:] = 0.6, 0.5, 0.01
    assert np.exp(analysis.log_final(lucky, "last")) == pytest.approx(0.5)
    assert np.exp(analysis.log_final(result(run, np.inf), "last")) == pytest.approx(UNTRAINED)
    at_w = result(run, 0.5, averaged=(0.4, 0.3))
    assert np.exp(analysis.log_final(at_w, "polynomial")) == pytest.approx(0.3)


def test_of_averaged_weights_each_method_takes_the_better():
    data = data_of(measured(TEXT, told))
    for method in data.grid.values():
        at_w, averaged = (np.exp(method.at(0.2, w, analysis.log_final)) for w in ("w", "w̄"))
        np.testing.assert_allclose(averaged, 0.8 * at_w)


def test_a_seed_with_missing_runs_is_left_out_of_a_grid_once_one_is_whole():
    whole = measured(TEXT, told)
    assert set(data_of(whole).grid["cabs"].runs[0.2]) == {0, 1}
    del whole.runs["cifar10/constant-16/lr-0.2-seed-1"]
    assert set(data_of(whole).grid["cabs"].runs[0.2]) == {0}
    del whole.runs["cifar10/constant-16/lr-0.2-seed-0"]
    assert set(data_of(whole).grid["cabs"].runs[0.2]) == {0, 1}


def test_the_best_constant_size_is_that_of_the_lowest_loss_at_its_best_rate():
    data = data_of(measured(TEXT, told))
    assert analysis.best_constant(data.tuning).label == "constant-16"
    assert data.tuning["constant-128"].choice() == (0.2, None)


def test_sensitivity_is_over_the_best_of_all_and_counts_no_loss_beyond_the_untrained():
    def lost(run):
        diverges = run.method == "constant-16" and run.learning_rate == 0.4
        return told(run) | ({"loss": np.inf} if diverges else {})

    seeds, found = analysis.sensitivity(data_of(measured(TEXT, lost)), "w")
    assert seeds == [0, 1]
    np.testing.assert_allclose(found["cabs"].excess, np.log([1.2, 1, 1.2]).mean())
    for seed in seeds:
        untrained = UNTRAINED / (0.5 * (1 + 0.01 * seed))
        by_hand = np.log([1.2 * 1.4, 1.4, untrained]).mean()
        assert found["constant-16"].excess[seed] == pytest.approx(by_hand)
    assert found["cabs"].decades == pytest.approx(np.log10(4))  # all of it is below 1.0


def test_a_clock_takes_the_quickest_run_of_a_kind_and_charges_no_variance_to_constant_sizes():
    runs = {run.method: run for run in plan.parse(TEXT).runs}
    seconds = {16: 0.01, 64: 0.04}
    alone = result(runs["constant-16"], 0.5, step_seconds=seconds)
    loaded = alone._replace(step_seconds={16: 0.03, 64: 0.05})
    cabs = result(runs["cabs"], 0.5, size=40, step_seconds={16: 0.02})
    clock = analysis.Clock([loaded, alone, cabs])
    recorded = runs["constant-128"]
    config = recorded.config.__class__(**(vars(recorded.config) | {"record_variance": True}))
    assert clock.of(recorded._replace(config=config)) == seconds
    made = result(recorded, 0.5, size=40)
    np.testing.assert_allclose(clock.seconds(made)[-1], made.summary["steps"] * 0.025)
    beyond = result(recorded, 0.5, size=128)
    np.testing.assert_allclose(clock.seconds(beyond)[-1], beyond.summary["steps"] * 0.08)
    assert clock.step_cost(recorded) == pytest.approx((0.0, 0.000625))
    assert clock.step_cost(runs["cabs"]) is None
    assert analysis.Clock([]).seconds(made) is None


def test_every_table_has_the_constant_size_equal_to_the_mean_of_cabs():
    data = data_of(measured(TEXT, told))
    for table in (tables.grid(data), tables.finals(data)):
        rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
        own = {name: row for name, row in rows.items() if name.endswith("interpolated")}
        assert own
        for row in own.values():
            assert row["mean size"] == "32"
    # 32 is a third of the way from 16 to 128: 0.7^(2/3) · 0.9^(1/3), times √1.01 of two seeds.
    row = dict(zip(tables.grid(data).header, tables.grid(data).rows[-1], strict=True))
    assert row["loss, w"] == f"{0.7 ** (2 / 3) * 0.9 ** (1 / 3) * 1.01**0.5:.3g}"


def test_the_floor_is_that_of_the_variance_along_the_run():
    data = data_of(measured(TEXT, told))
    assert tables.floor(data.tuning["constant-16"], 0.4) == pytest.approx((64.0, 0.4))
    rows = {row[:2]: row for row in tables.floors(data).rows}
    assert rows["constant-128", "0.2"][2:4] == ("64", "0.025")


def finals_by_the_clock():
    text = TEXT.replace("[0.1, 0.2, 0.4]", "[0.2]").replace("[0, 1]", "[3, 4]")
    clock = [
        result(run, 0.5, step_seconds={16: 0.02, 128: 0.13})
        for run in plan.parse(TEXT).runs  # 4 ms + 1 ms · m
    ]
    return data_of(measured(text, told), clock=clock)


def test_who_is_the_quickest_depends_on_the_devices():
    data = finals_by_the_clock()
    goals = {(goal.target, goal.weights): goal for goal in tables.goals(data)}
    assert set(goals) == {(t, w) for t in (1.2, 1.0, 0.8) for w in ("w", "w̄")}
    works = goals[1.2, "w"].works
    few, many = works["CABS, α = 0.2"], works["constant-16, α = 0.2"]
    assert few.steps * 0.001 * 32 == pytest.approx(few.examples * 0.004, rel=0.1)
    assert many.steps > few.steps
    table = tables.by_devices(tables.goals(data))
    assert "constant-128, α = 0.2: " in table.rows[0][1]
    assert table.rows[0][1].endswith("∞")


def test_no_axes_stay_empty_where_the_targets_fill_no_row(monkeypatch):
    monkeypatch.setattr(page.figures, "_png", lambda figure, title: figure)
    data = finals_by_the_clock()
    drawn = page.figures.by_devices(data, tables.goals(data)[:5])
    assert [bool(ax.lines) for ax in drawn.axes] == 5 * [True]


@pytest.mark.slow  # draws all figures
def test_the_figures_come_before_the_criteria_and_the_page_is_one_file(tmp_path):
    parts = [measured(TEXT, told)]
    markdown, page_path = report.write(parts, tmp_path / "out", parts)
    text = markdown.read_text()
    assert text.rindex("](figures/") < text.index("## How the verdicts follow")
    names = {path.name for path in page_path.parent.iterdir()}
    assert names == {"report.md", "report.html", "figures"}
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {f"cifar10-{x}.png" for x in ("curves", "sensitivity", "floors", "devices")}
    assert page_path.read_text().count('src="data:image/png;base64,') == 4
    assert 'src="figures' not in page_path.read_text()


@pytest.mark.slow
def test_parts_of_the_study_that_were_not_given_are_named():
    sections = page.sections(parts := [measured(TEXT, told)], [data_of(*parts)])
    (run,) = [section for section in sections if section.heading == "What was run"]
    states = {(part, stage): state for part, stage, state in run.table.rows}
    assert states["A, cifar10", "grid"] == "18 of 18 runs"
    assert states["A, cifar10", "finals"] == "not in this report"
    assert states["A, cifar10", "decreasing learning rates (A2)"] == "not in this report"
    assert states["B, mnist", "grid"] == "not in this report"


def test_a_page_of_runs_that_answer_no_question_of_the_study_names_none():
    text = TEXT.replace("cifar10]", "text]").replace("[methods.cabs]", "[methods.constant]")
    parts = [measured(text, lambda run: told(run._replace(method="constant-16")))]
    headings = [section.heading for section in page.sections(parts, [data_of(*parts)])]
    assert not {"What was run", "Verdicts", "How the verdicts follow"} & set(headings)
    assert {"Data", "How it was measured"} <= set(headings)


def test_accuracy_axes_hold_all_that_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(report.page.figures, "_png", lambda figure, title: drawn.append(figure))
    accuracies = iter(np.linspace(0.05, 0.999, 18))
    data = data_of(measured(TEXT, lambda run: told(run) | {"accuracy": next(accuracies)}))
    page.figures.sensitivity(data)
    page.figures.curves(data)
    axes = [ax for figure in drawn for ax in figure.axes if "accuracy" in ax.get_ylabel()]
    assert len(axes) == 3
    for ax in axes:
        low, high = ax.get_ylim()
        values = np.concatenate([line.get_ydata() for line in ax.lines])
        assert len(values)
        assert low < values.min() <= values.max() < high


@pytest.mark.slow  # draws two figures each
@pytest.mark.parametrize("method", ["cabs_momentum", "norm_test", "constant"])
@pytest.mark.parametrize("loss", [0.5, 0.0, float("inf")])
def test_a_sweep_of_any_methods_has_a_page(method, loss, monkeypatch):
    monkeypatch.setattr(page.figures, "_png", lambda figure, title: title.encode())
    text = f"""
        learning_rates = [0.1, 0.2, 0.4]
        examples = 1440
        [datasets.digits]
        [methods.cabs-adam]
        method = "cabs_adam"
        [methods.it]
        method = "{method}"
        """
    parts = [measured(text, lambda run: {"loss": loss})]
    found = analysis.data_sets(parts, analysis.Clock([]))
    sections = page.sections(parts, found)
    figures = [figure for section in sections for figure in section.figures]
    assert len(figures) >= 2 * len(found)
    assert all(figure.png for figure in figures)


def test_a_compact_file_keeps_averaged_weights_and_what_was_not_measured(tmp_path):
    kept = finished()
    nan = np.nan
    thinned = {
        name: run._replace(
            averaged={"exponential": (run.train_loss, run.test_accuracy)},
            variance=np.arange(40.0),
        )
        for name, run in kept.runs.items()
    }
    results.save(kept._replace(runs=thinned), tmp_path / "results.jsonl")
    for run in results.load(tmp_path / "results.jsonl").runs.values():
        losses, accuracies = run.averaged["exponential"]
        np.testing.assert_allclose(losses[[0, -1]], [2.3, 0.5])
        np.testing.assert_array_equal(accuracies, [nan] * 9 + [0.5])
        np.testing.assert_array_equal(run.test_accuracy, [nan] * 9 + [0.5])
        np.testing.assert_array_equal(run.variance, np.arange(40.0))
