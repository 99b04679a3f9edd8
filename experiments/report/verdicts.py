"""The paper's claims as questions, each answered by stated criteria from the numbers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report import analysis
from experiments.report.analysis import DataSet, Method
from experiments.report.intervals import CONFIRMED, UNDECIDED
from experiments.report.statistics import Spread

PARTLY, NOT, NO_DATA = "partly", "not confirmed", "no data"
MARGIN = 1.05  # ratios within it count as equal
POINTS = 0.01  # so do accuracies within it


class Answer(NamedTuple):
    """Of one data set: a verdict and the numbers that it follows from."""

    verdict: str
    numbers: str


class Need(NamedTuple):
    """What a data set must have for a question: a test of it, and what a plan asks for it with."""

    is_met: Callable[[DataSet], bool]
    plan: str


class Question(NamedTuple):
    """A research question: what it needs, what decides it, and how."""

    name: str
    question: str
    criteria: str
    needs: tuple[Need, ...]
    answer: Callable[[DataSet], Answer]


class Verdict(NamedTuple):
    """The answers to a question, by the title of the data set, and what they amount to.

    Attributes:
      question: The question.
      overall: What all answers amount to, the undecided left out.
      advice: Goes on after `overall`: where there is no data, what would give some.
      answers: Those of the data sets that have what it needs.
    """

    question: Question
    overall: str
    advice: str
    answers: dict[str, Answer]


def verdicts(data_sets: Sequence[DataSet]) -> list[Verdict]:
    """Answers every question on every data set whose methods can answer it."""
    return [_verdict(question, data_sets) for question in QUESTIONS]


def _verdict(question: Question, data_sets: Sequence[DataSet]) -> Verdict:
    unmet = {d.title: [n.plan for n in question.needs if not n.is_met(d)] for d in data_sets}
    answers = {d.title: question.answer(d) for d in data_sets if not unmet[d.title]}
    if not answers:
        fewest: list[str] = min(unmet.values(), key=len)
        advice = (
            f": it takes finished runs of {', and '.join(fewest)}; add to the plan what it lacks"
        )
        return Verdict(question, NO_DATA, advice, answers)
    given = {answer.verdict for answer in answers.values()}
    decided = given - {UNDECIDED} or given
    return Verdict(question, decided.pop() if len(decided) == 1 else PARTLY, "", answers)


def _speed(data: DataSet) -> Answer:
    """CABS's examples and seconds to the target beside the fewest that any constant size takes."""
    cabs, constants = _cabs(data), _members(data, analysis.is_constant)
    own, *others = (_best_times(m, data.target) for m in (cabs, *constants))
    quickest = tuple(min((times[i] for times in others), key=_median) for i in (0, 1))
    quicker = list(map(_less, own, quickest))
    large = [m.config.batch_size >= 128 for m in constants]
    beaten = [
        method.title
        for method, times, is_large in zip(constants, others, large, strict=True)
        if is_large and all(map(_less, own, times))
    ]
    rate = cabs.fastest_rate(data.target)
    same = [m.title for m in constants if cabs.sizes(rate) == {m.config.batch_size}]
    if same:
        verdict = UNDECIDED
    elif all(quicker):
        verdict = CONFIRMED
    else:
        verdict = PARTLY if any(quicker) or 0 < sum(large) == len(beaten) else NOT
    examples, seconds = (_times(_ratio(own[i].median, quickest[i].median)) for i in (0, 1))
    kept = f"at α = {rate:g} its batches are those of {same[0]} throughout; " if same else ""
    return Answer(
        verdict,
        f"{kept}examples {examples} and seconds {seconds} those of the quickest constant size, "
        f"each at its fastest α; at the shared α examples {_times(_ratio_at_shared(data))}; "
        f"quicker than {' and '.join(beaten) or 'no constant size of 128 or more'}, at a mean "
        f"batch of {cabs.mean_batch_size(rate).median:.0f}",
    )


def _ratio_at_shared(data: DataSet) -> float:
    """CABS's examples over those of the quickest constant size, all at the shared rate, or NaN."""
    cabs, constants = _cabs(data), _members(data, analysis.is_constant)
    rate = data.shared_rate
    if any(rate not in method.by_rate for method in (cabs, *constants)):
        return float("nan")
    fewest = min(m.to_target(rate, data.target).median for m in constants)
    return _ratio(cabs.to_target(rate, data.target).median, fewest)


def _schedules(data: DataSet) -> Answer:
    cabs = _cabs(data)
    decayed = _members(data, analysis.is_scheduled)
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


def _sensitivity(data: DataSet) -> Answer:
    cabs = _cabs(data)
    others = _members(data, _is_other)
    everyone = [cabs, *others]
    if hardly := _hardly_trained(data):
        narrow = {m.title: analysis.decades_of_best(m, everyone, 1.25) for m in everyone}
        return Answer(
            UNDECIDED,
            f"{hardly}; decades within 1.25× of the best: "
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


def _against_rivals(data: DataSet) -> Answer:
    cabs = _cabs(data)
    constants, rivals = (_members(data, kind) for kind in (analysis.is_constant, analysis.is_rival))
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


def _cabs(data: DataSet) -> Method:
    return _members(data, analysis.is_cabs)[0]


def _members(data: DataSet, belongs: Callable[[Method], bool]) -> list[Method]:
    return [method for method in data.methods.values() if belongs(method)]


def _is_other(method: Method) -> bool:
    return analysis.is_constant(method) or analysis.is_rival(method)


def _need(belongs: Callable[[Method], bool], plan: str) -> Need:
    return Need(lambda data: bool(_members(data, belongs)), plan)


_CABS = _need(analysis.is_cabs, 'CABS (method = "cabs")')
_CONSTANT = _need(analysis.is_constant, 'a constant size (method = "constant")')
_RIVAL = _need(analysis.is_rival, 'another adaptive size (such as method = "norm_test")')
_OTHER = _need(_is_other, 'a constant or another adaptive size (such as method = "constant")')
_SCHEDULED = _need(
    analysis.is_scheduled, 'a decreasing rate (method = "constant", schedule = "cosine" or "step")'
)
_GRID = Need(lambda data: data.is_grid, f"{analysis.FEWEST_RATES} learning_rates or more")

QUESTIONS = (
    Question(
        "RQ1",
        "Does adapting the batch size speed up optimisation?",
        "confirmed: fewer examples and less time to the target loss than every constant size, each "
        "at the α of its fewest examples; partly: one of both, or less of both than every constant "
        "size from 128 up; a difference counts from 5 %, if the ranges over seeds do not overlap; "
        "undecided where CABS never left the size of a constant one: then both are the same run, "
        "and what differs is float32's rounding or the α",
        (_CABS, _CONSTANT),
        _speed,
    ),
    Question(
        "RQ2",
        "Does coupling remove the need for a decreasing learning rate?",
        "confirmed: at constant α CABS ends within 5 % of the loss of the best decreasing schedule "
        "and below the constant size without one; partly: one of both",
        (_CABS, _SCHEDULED),
        _schedules,
    ),
    Question(
        "RQ3",
        "Is it less sensitive to the learning rate than constant and other adaptive sizes?",
        "confirmed: more decades of α within 2× of the best final loss of all methods than every "
        "other; partly: than at least half of them; a difference counts from 0.05; undecided where "
        "an untrained net is within 2×; not asked of fewer than three α",
        (_CABS, _OTHER, _GRID),
        _sensitivity,
    ),
    Question(
        "RQ4",
        "How do speed and final accuracy compare with constant sizes and other adaptive rules?",
        "confirmed (on par or better): test accuracy at most a point below the best constant and "
        "the best adaptive rival, and at most 5 % more examples to the target than the quickest "
        "adaptive rival; partly: one of both; undecided where an untrained net's loss is within "
        "2×. Accuracies have a standard error of up to 1.6 points on 1,000 examples",
        (_CABS, _CONSTANT, _RIVAL),
        _against_rivals,
    ),
)


def growth(data: DataSet) -> str | None:
    """How CABS's batch size moves over the run at its best learning rate, in words and numbers."""
    if not _CABS.is_met(data):
        return None
    cabs = _cabs(data)
    runs = cabs.by_rate[cabs.best_rate]
    sizes = np.median([result.batch_sizes for result in runs], axis=0)
    smallest = cabs.config.min_batch_size
    share = float(np.mean(sizes <= smallest * MARGIN))
    return (
        f"at α = {cabs.best_rate:g} it is at its minimum of {smallest} in {share:.0%} of the run, "
        f"{sizes[len(sizes) // 2]:.0f} half way and {sizes[-1]:.0f} at the end"
    )


def _hardly_trained(data: DataSet) -> str:
    """Says so where the best loss of all is more than half of an untrained net's, else ""."""
    plain = analysis.plain(data.methods.values())
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
    if ours == theirs:  # both 0, where the untrained net is at the target
        return 1.0
    return ours / theirs if theirs else float("inf")


def _times(ratio: float) -> str:
    if np.isnan(ratio):
        return "(neither gets there)"
    if np.isinf(ratio):
        return "(never there)"
    if ratio == 0:
        return "0× (they never get there)"
    return f"{ratio:.2f}×"
