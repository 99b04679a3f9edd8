"""The paper's claims as questions, each answered by stated criteria from the numbers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report import analysis
from experiments.report.analysis import DataSet, Method, Spread

CONFIRMED, PARTLY, NOT, UNDECIDED = "confirmed", "partly", "not confirmed", "undecided"
MARGIN = 1.05  # ratios within it count as equal
POINTS = 0.01  # so do accuracies within it


class Answer(NamedTuple):
    """Of one data set: a verdict and the numbers that it follows from."""

    verdict: str
    numbers: str


class Question(NamedTuple):
    """A research question: what decides it, and how."""

    name: str
    question: str
    criteria: str
    answer: Callable[[DataSet], Answer | None]


class Verdict(NamedTuple):
    """The answers to a question, by the title of the data set, and what they amount to."""

    question: Question
    overall: str
    answers: dict[str, Answer]


def verdicts(data_sets: Sequence[DataSet]) -> list[Verdict]:
    """Answers every question on every data set whose methods can answer it."""
    result = []
    for question in QUESTIONS:
        answers = {d.title: answer for d in data_sets if (answer := question.answer(d))}
        given = {answer.verdict for answer in answers.values()} - {UNDECIDED}
        overall = "no data" if not given else given.pop() if len(given) == 1 else PARTLY
        result.append(Verdict(question, overall, answers))
    return result


def _speed(data: DataSet) -> Answer | None:
    cabs, constants = _cabs(data), _members(data, analysis.is_constant)
    if cabs is None or not constants:
        return None
    rate = cabs.fastest_rate(data.target)
    own = _best_times(cabs, data.target)
    others = {m.title: _best_times(m, data.target) for m in constants}
    quickest = [min((times[i] for times in others.values()), key=_median) for i in (0, 1)]
    ratios = [_ratio(own[i].median, quickest[i].median) for i in (0, 1)]
    large = [m for m in constants if m.config.batch_size >= 128]
    beaten = [m.title for m in large if all(_less(own[i], others[m.title][i]) for i in (0, 1))]
    same = [m.title for m in constants if cabs.sizes(rate) == {m.config.batch_size}]
    quicker = [_less(own[i], quickest[i]) for i in (0, 1)]
    if same:
        verdict = UNDECIDED
    elif all(quicker):
        verdict = CONFIRMED
    elif any(quicker) or (large and len(beaten) == len(large)):
        verdict = PARTLY
    else:
        verdict = NOT
    shared = [
        _ratio(
            cabs.to_target(data.shared_rate, data.target).median,
            min(m.to_target(data.shared_rate, data.target).median for m in constants),
        )
        if _have(data.shared_rate, [cabs, *constants])
        else float("nan")
    ]
    numbers = (
        f"examples {_times(ratios[0])} and seconds {_times(ratios[1])} those of the quickest "
        f"constant size, each at its fastest α; at the shared α examples {_times(shared[0])}; "
        f"quicker than {' and '.join(beaten) if beaten else 'no constant size of 128 or more'}, "
        f"at a mean batch of {cabs.mean_batch_size(rate).median:.0f}"
    )
    if same:
        numbers = f"at α = {rate:g} its batches are those of {same[0]} throughout; {numbers}"
    return Answer(verdict, numbers)


def _schedules(data: DataSet) -> Answer | None:
    cabs = _cabs(data)
    decayed = _members(data, analysis.is_scheduled)
    if cabs is None or not decayed:
        return None
    sizes = {m.config.batch_size for m in decayed}
    plain = [m for m in _members(data, analysis.is_constant) if m.config.batch_size in sizes]
    own = cabs.final_loss(cabs.best_rate).median
    best_decayed = min(m.final_loss(m.best_rate).median for m in decayed)
    best_plain = min((m.final_loss(m.best_rate).median for m in plain), default=float("inf"))
    as_good = own <= best_decayed * MARGIN
    better = own < best_plain / MARGIN
    needed = best_decayed < best_plain / MARGIN
    if as_good and (better or not needed):
        verdict = CONFIRMED if better else PARTLY
    else:
        verdict = PARTLY if as_good or better else NOT
    note = "" if needed else "; here a decreasing rate does not help the constant size either"
    return Answer(
        verdict,
        f"final training loss {own:.3g} with CABS at constant α; "
        + "; ".join(f"{m.title} {m.final_loss(m.best_rate).median:.3g}" for m in (*decayed, *plain))
        + note,
    )


def _sensitivity(data: DataSet) -> Answer | None:
    cabs = _cabs(data)
    others = [m for m in data.methods.values() if analysis.is_constant(m) or analysis.is_rival(m)]
    if cabs is None or not others or not data.is_grid:
        return None
    everyone = [cabs, *others]
    if _hardly_trained(data):
        narrow = {m.title: analysis.decades_of_best(m, everyone, 1.25) for m in everyone}
        return Answer(
            UNDECIDED,
            f"{_hardly_trained(data)}; decades within 1.25× of the best: "
            + ", ".join(f"{title} {value:.2f}" for title, value in narrow.items()),
        )
    own = analysis.decades_of_best(cabs, everyone)
    theirs = {m.title: analysis.decades_of_best(m, everyone) for m in others}
    beaten = [title for title, value in theirs.items() if value < own - 0.05]
    matched = [title for title, value in theirs.items() if abs(value - own) <= 0.05]
    if len(beaten) == len(others):
        verdict = CONFIRMED
    else:
        verdict = PARTLY if len(beaten) * 2 >= len(others) else NOT
    widest = max(theirs, key=lambda title: theirs[title])
    return Answer(
        verdict,
        f"{own:.2f} decades of α within 2× of the best loss of all; less sensitive than "
        f"{len(beaten)} of {len(others)} others and equal to {len(matched)}; "
        f"the widest of them is {widest} with {theirs[widest]:.2f}; "
        f"within 2× of its own best {analysis.decades(cabs):.2f}, "
        f"{others[0].title} {analysis.decades(others[0]):.2f}",
    )


def _against_rivals(data: DataSet) -> Answer | None:
    cabs = _cabs(data)
    constants, rivals = (_members(data, kind) for kind in (analysis.is_constant, analysis.is_rival))
    if cabs is None or not constants or not rivals:
        return None
    accuracy = cabs.final_accuracy(cabs.best_rate).median
    groups = {"constant": constants, "adaptive": rivals}
    leads = {
        name: max(members, key=lambda m: m.final_accuracy(m.best_rate).median)
        for name, members in groups.items()
    }
    gaps = {name: accuracy - m.final_accuracy(m.best_rate).median for name, m in leads.items()}
    examples = {m.label: _best_times(m, data.target)[0].median for m in (cabs, *rivals)}
    quickest = min(rivals, key=lambda m: examples[m.label])
    ratio = _ratio(examples[cabs.label], examples[quickest.label])
    on_par = min(gaps.values()) >= -POINTS
    quick = ratio <= MARGIN
    verdict = CONFIRMED if on_par and quick else PARTLY if on_par or quick else NOT
    hardly = _hardly_trained(data)
    return Answer(
        UNDECIDED if hardly else verdict,
        f"{hardly}; " * bool(hardly)
        + f"test accuracy {accuracy:.1%}, "
        + ", ".join(
            f"{100 * gap:+.1f} points on the best {name} ({leads[name].title})"
            for name, gap in gaps.items()
        )
        + f"; examples {_times(ratio)} those of the quickest adaptive rival ({quickest.title})",
    )


QUESTIONS = (
    Question(
        "RQ1",
        "Does adapting the batch size speed up optimisation?",
        "confirmed: fewer examples and less time to the target loss than every constant size, each "
        "at the α of its fewest examples; partly: one of both, or less of both than every constant "
        "size from 128 up; a difference counts from 5 %, if the ranges over seeds do not overlap; "
        "undecided where CABS never left the size of a constant one: then both are the same run, "
        "and what differs is float32's rounding or the α",
        _speed,
    ),
    Question(
        "RQ2",
        "Does coupling remove the need for a decreasing learning rate?",
        "confirmed: at constant α CABS ends within 5 % of the loss of the best decreasing schedule "
        "and below the constant size without one; partly: one of both",
        _schedules,
    ),
    Question(
        "RQ3",
        "Is it less sensitive to the learning rate than constant and other adaptive sizes?",
        "confirmed: more decades of α within 2× of the best final loss of all methods than every "
        "other; partly: than at least half of them; a difference counts from 0.05; undecided where "
        "an untrained net is within 2×; not asked of fewer than three α",
        _sensitivity,
    ),
    Question(
        "RQ4",
        "How do speed and final accuracy compare with constant sizes and other adaptive rules?",
        "confirmed (on par or better): test accuracy at most a point below the best constant and "
        "the best adaptive rival, and at most 5 % more examples to the target than the quickest "
        "adaptive rival; partly: one of both; undecided where an untrained net's loss is within "
        "2×. Accuracies have a standard error of up to 1.6 points on 1,000 examples",
        _against_rivals,
    ),
)


def growth(data: DataSet) -> str | None:
    """How CABS's batch size moves over the run at its best learning rate, in words and numbers."""
    cabs = _cabs(data)
    if cabs is None:
        return None
    runs = cabs.by_rate[cabs.best_rate]
    sizes = np.median([result.batch_sizes for result in runs], axis=0)
    smallest = cabs.config.min_batch_size
    share = float(np.mean(sizes <= smallest * MARGIN))
    return (
        f"at α = {cabs.best_rate:g} it is at its minimum of {smallest} in {share:.0%} of the run, "
        f"{sizes[len(sizes) // 2]:.0f} half way and {sizes[-1]:.0f} at the end"
    )


def _cabs(data: DataSet) -> Method | None:
    found = _members(data, analysis.is_cabs)
    return found[0] if found else None


def _members(data: DataSet, belongs: Callable[[Method], bool]) -> list[Method]:
    return [method for method in data.methods.values() if belongs(method)]


def _have(rate: float, methods: Sequence[Method]) -> bool:
    return all(rate in method.by_rate for method in methods)


def _hardly_trained(data: DataSet) -> str:
    """Says so where the best loss of all is more than half of an untrained net's, else ""."""
    plain = [m for m in data.methods.values() if not analysis.is_variant(m)]
    best = min(m.final_loss(m.best_rate).median for m in plain)
    start = float(plain[0].by_rate[plain[0].rates[0]][0].train_loss[0])
    if 2 * best < start:
        return ""
    return f"the best loss of all, {best:.3g}, is more than half of an untrained net's, {start:.3g}"


def _best_times(method: Method, target: float) -> tuple[Spread, Spread]:
    """Examples and seconds to the target, both at the rate of the fewest examples."""
    rate = method.fastest_rate(target)
    return method.to_target(rate, target), method.seconds_to_target(rate, target)


def _less(ours: Spread, theirs: Spread) -> bool:
    """Whether the median is smaller by more than the margin, and every seed than every seed."""
    return ours.median * MARGIN < theirs.median and ours.high < theirs.low


def _median(spread: Spread) -> float:
    return spread.median


def _ratio(ours: float, theirs: float) -> float:
    if np.isinf(theirs):
        return float("nan") if np.isinf(ours) else 0.0
    return ours / theirs


def _times(ratio: float) -> str:
    if np.isnan(ratio):
        return "(neither gets there)"
    if np.isinf(ratio):
        return "(never there)"
    if ratio == 0:
        return "0× (they never get there)"
    return f"{ratio:.2f}×"
