"""What is on the page: what was run, the verdicts, each data set, how it was measured."""

from collections.abc import Iterable, Sequence

from experiments.report import analysis, figures, study, tables, verdicts
from experiments.report.analysis import DataSet
from experiments.report.render import Figure, Section, Table
from experiments.report.results import Results
from experiments.report.verdicts import NOT_RUN, Answer, Question
from experiments.sweeps.plan import Run

NOT_HERE = "not in this report"
_MEASURED = (
    "Losses are on the same training examples in every run. The final loss is the median of the "
    "last three evaluations, that of a diverged run the untrained net's; a run that was ended "
    "half way for want of progress counts with the loss that it had. Means of losses and of "
    "costs over seeds are geometric.",
    "At w̄ each method counts with the better of two averages of its weights: exponential (0.99 a "
    "step) and polynomial-decay (power 3). Intervals are 95 % t-intervals over seeds, paired.",
    "Examples, seconds or steps to a target: where the running median of three evaluations "
    "reaches it, its logarithm linear between evaluations; ≥ marks bounds, where a run did not.",
    "Seconds: the steps made times t(m), the time of a step of m examples on a machine with "
    "nothing else to do (the runs of --clock; without them, the quickest of these runs), ξ being "
    "measured only where the method needs it. For n devices t(m) = a + b·m/n, fitted.",
    "Over all α: the geometric mean over the grid of the final loss relative to the best of all "
    "methods, no loss above the untrained net's. Decades: of α at which the loss is good enough.",
    "The constant size of CABS is that equal to its own mean size, interpolated in ln m between "
    "the constant sizes that were run: what is left to CABS is what adapting is worth.",
    "Seeds of which runs of a grid are missing are left out of it, once one is whole.",
)


def sections(parts: Sequence[Results], data_sets: Sequence[DataSet]) -> list[Section]:
    """The sections of the report, in the order of the page."""
    notes = tuple(dict.fromkeys(note for part in parts for note in part.plan.notes))
    found = [Section(paragraphs=(_status(parts),), points=notes)]
    if data_sets:
        if any(data.label in study.BY_DATA_SET for data in data_sets):
            found.append(_what_was_run(data_sets))
        given = {question: verdicts.answers(question, data_sets) for question in verdicts.QUESTIONS}
        is_asked = any(given.values())
        if is_asked:
            found.append(_summary(given))
            found += [_question(question, answers) for question, answers in given.items()]
        found += [section for data in data_sets for section in _data_set(data)]
        if is_asked:
            criteria = tuple(f"{q.name}: {q.criteria}." for q in verdicts.QUESTIONS)
            found.append(Section(heading="How the verdicts follow", points=criteria))
    machines = dict.fromkeys(_machine(r.environment) for p in parts for r in p.runs.values())
    clocks = tuple(line for data in data_sets for line in _clock(data))
    measured = (*machines, *dict.fromkeys(clocks), *_MEASURED)
    found.append(Section(heading="How it was measured", points=measured))
    found.append(_runs(parts))
    return found


def _status(parts: Sequence[Results]) -> str:
    done = sum(len(part.runs) for part in parts)
    planned = sum(len(part.plan.runs) for part in parts)
    diverged = sum(bool(r.summary["diverged"]) for part in parts for r in part.runs.values())
    status = f"{done} of {planned} runs, {diverged} of which diverged."
    if done < planned:
        status += " Runs are missing, which are named at the end; what rests on a part says so."
    return status


def _what_was_run(data_sets: Sequence[DataSet]) -> Section:
    """The parts of the study's plan, and how far they went."""
    by_label = {data.label: data for data in data_sets if data.is_plain}
    rows = []
    for label, asked in study.BY_DATA_SET.items():
        data = by_label.get(label)
        stages = {"grid": data.grid if data else {}, "finals": _finals(data, False)}
        if asked.schedules:
            stages["decreasing learning rates (A2)"] = _finals(data, True)
        for stage, methods in stages.items():
            done, planned = analysis.progress(methods.values())
            state = f"{done} of {planned} runs" if planned else NOT_HERE
            rows.append((f"{asked.part}, {label}", stage, state))
    others = [d.title for d in data_sets if d.label in study.BY_DATA_SET and not d.is_plain]
    rows.append(("E, cifar10", "momentum and Adam", "; ".join(others) or NOT_HERE))
    rows.append(("D, digits", "all methods", f"by `compare --all-methods`, {NOT_HERE}"))
    table = Table(("part of the plan", "runs", "state"), rows)
    return Section(heading="What was run", table=table)


def _finals(data: DataSet | None, scheduled: bool) -> dict[str, analysis.Method]:
    methods = data.finals if data else {}
    return {k: m for k, m in methods.items() if analysis.is_scheduled(m.config) == scheduled}


def _summary(given: dict[Question, list[Answer]]) -> Section:
    """One line for each claim: at w, at w̄, and together."""
    rows = []
    for question, answers in given.items():
        claims: dict[tuple[str, str], list[Answer]] = {}
        for answer in answers:
            claims.setdefault((answer.data, answer.method), []).append(answer)
        rows += [
            (question.name, data, method, *(_verdict(a) for a in both), verdicts.overall(both))
            for (data, method), both in claims.items()
        ]
    header = ("question", "data set", "method", "at w", "at w̄", "so the claim is")
    return Section(heading="Verdicts", table=Table(header, rows))


def _question(question: Question, answers: Sequence[Answer]) -> Section:
    rows = list(
        dict.fromkeys(  # what was not run is the same at w and w̄
            (
                a.data,
                a.method,
                "" if a.found.verdict == NOT_RUN else a.weights,
                _verdict(a),
                a.found.numbers,
            )
            for a in answers
        )
    )
    nothing = "" if rows else " No data: add CABS and constant sizes to the plan, over three α."
    return Section(
        lead=question.name,
        paragraphs=(question.question + nothing,),
        table=Table(("data set", "method", "at", "verdict", "numbers"), rows) if rows else None,
    )


def _verdict(answer: Answer) -> str:
    remarks = "; ".join(answer.found.remarks)
    return f"{answer.found.verdict} ({remarks})" if remarks else answer.found.verdict


def _data_set(data: DataSet) -> list[Section]:
    def figure(name: str, caption: str, png: bytes) -> Figure:
        return Figure(f"figures/{data.name}-{name}.png", f"{data.title}: {caption}", png)

    goals = tables.goals(data)
    which = "Finals" if any(m.runs for m in data.finals.values()) else "Grid, at the best α of each"
    against = "training loss against examples, seconds and steps; batch sizes, test accuracy"
    drawn = [figure("curves", against, figures.curves(data))]
    if goals:
        who = "who is the quickest on how many devices"
        drawn.append(figure("devices", who, figures.by_devices(data, goals)))
    ragged = data.grid and not analysis.sensitivity(data, "w")[0]
    beware = " No seed of the grid is whole: methods are shown over different α." if ragged else ""
    parts = [
        Section(
            heading=data.title,
            paragraphs=(f"{data.setting}. {which}; lines are medians, bands all seeds.{beware}",),
            figures=tuple(drawn),
            table=tables.finals(data),
        )
    ]
    if goals:
        parts.append(Section(table=tables.by_devices(goals)))
    if any(method.runs for method in data.grid.values()):
        caption = "final loss and accuracy against the learning rate"
        drawn = [figure("sensitivity", caption, figures.sensitivity(data))]
        parts.append(Section(figures=tuple(drawn), table=tables.grid(data)))
        if analysis.constants(data.tuning):
            floors = figure("floors", "loss reached, and the noise floor", figures.floors(data))
            parts.append(Section(figures=(floors,), table=tables.floors(data)))
    return parts


def _clock(data: DataSet) -> Iterable[str]:
    """What a step of each method costs, by the line through it."""
    for method in (*data.tuning.values(), *data.finals.values()):
        run = method.planned[0]
        if cost := data.clock.step_cost(run):
            steps = data.clock.of(run).items()
            worst = max(abs((cost.step + cost.example * m) / t - 1) for m, t in steps)
            yield (
                f"{data.title}, {method.title}: t(m) = {1000 * cost.step:.3g} ms + "
                f"{1000 * cost.example:.3g} ms · m, within {worst:.0%} of what was measured at m = "
                f"{', '.join(str(m) for m, _ in steps)}."
            )


def _machine(environment: dict[str, object]) -> str:
    return f"Machine: {', '.join(f'{key} {value}' for key, value in environment.items())}."


def _runs(parts: Sequence[Results]) -> Section:
    diverged = [r.run for part in parts for r in part.runs.values() if r.summary["diverged"]]
    missing = [run for part in parts for run in part.missing]
    ended = [r.run for p in parts for r in p.runs.values() if r.summary.get("without_progress")]
    lines = (
        *_named("missing", missing),
        *_named("diverged", diverged),
        *_named("ended without progress", ended),
    )
    none = () if lines else ("None is missing and none diverged.",)
    return Section(heading="Runs", paragraphs=none, points=lines)


def _named(what: str, runs: Iterable[Run]) -> list[str]:
    """One line for all methods of a data set of which the same runs are meant."""
    rates: dict[tuple[str, str], dict[int, list[str]]] = {}
    for run in runs:
        seeds = rates.setdefault((run.dataset, run.method), {})
        seeds.setdefault(run.config.seed, []).append(f"{run.learning_rate:g}")
    methods: dict[tuple[str, str], list[str]] = {}
    for (dataset, method), seeds in rates.items():
        where = "; ".join(f"seed {seed}, α {', '.join(alphas)}" for seed, alphas in seeds.items())
        methods.setdefault((dataset, where), []).append(method)
    return [
        f"{what}, {dataset}, {', '.join(names)}: {where}"
        for (dataset, where), names in methods.items()
    ]
