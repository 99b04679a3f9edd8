"""Times of contenders that take turns, so that a change of the machine's mood meets them all."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHORTEST = 0.02
PAUSE = 0.01


def alternate(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Times all contenders in turn, `rounds` times, after untimed turns to warm up.

    Args:
      contenders: What to time; each returns when its work is done. Calls that last less than
        `SHORTEST` seconds are timed several at once. `PAUSE` seconds go by before each timing, for
        the idle threads of other contenders to stop spinning.
      rounds: Number of turns, at most.
      seconds: No further turn begins once this long was spent on timing.

    Returns:
      Seconds per call of each contender, one entry per round, so that entries at the same place
      were measured next to each other.
    """
    calls = {name: _calls(contender) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(_seconds(contender, calls[name]))
        if time.perf_counter() - started > seconds:
            break
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of pairwise quotients."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _calls(contender: Callable[[], Any]) -> int:
    """How many calls last `SHORTEST` seconds, found after a warm-up."""
    contender()
    calls = 1
    while _seconds(contender, calls) * calls < SHORTEST:
        calls *= 2
    return calls


def _seconds(contender: Callable[[], Any], calls: int) -> float:
    time.sleep(PAUSE)
    started = time.perf_counter()
    for _ in range(calls):
        contender()
    return (time.perf_counter() - started) / calls
