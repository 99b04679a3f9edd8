"""The whole CABS step, loader and transfer included, against plain SGD on the same examples."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import Parameter
from rich.console import Console

import cabs_jax
from experiments.benchmarks import _nets, _report, _timing
from experiments.benchmarks._loops import (
    SIZES,
    Problem,
    TimedRun,
    bare_call,
    cabs_loop,
    compiled_step,
    digits,
    optimizer_for,
    replay,
    sgd_loop,
    tiny,
    train,
)
from experiments.commands import Flag
from experiments.training.step import mean_loss

FIXED = (16, 64, 256, 1024)
SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Options:
    """How much to measure.

    Attributes:
      steps: Of a CABS run on a small net.
      batches: Batch sizes.
      seconds: Spent on each cell, about.
    """

    steps: int = 2000
    batches: tuple[int, ...] = (128, 512)
    seconds: float = 20.0


def against_sgd(options: Options) -> tuple[str, Any]:
    """At a size that CABS may not leave, so that both loops work through the same batches."""
    net = _nets.build("mnist_2c2d")
    problem = Problem(net.loss, net.params, net.examples(2048))
    rows, cells = [], []
    for size in options.batches:
        cabs, sgd = cabs_loop(problem, size, size), sgd_loop(problem, itertools.repeat(size))
        batch = jax.tree.map(jnp.asarray, net.examples(size))
        moments = jax.jit(cabs_jax.gradient_moments(net.loss))
        gradient = jax.jit(jax.value_and_grad(mean_loss(net.loss)))
        times = _timing.alternate(
            {
                "CABS": completed(next, cabs),
                "SGD": completed(next, sgd),
                "moments": completed(moments, net.params, batch),
                "gradient": completed(gradient, net.params, batch),
            },
            rounds=25,
            seconds=options.seconds,
        )
        loops = _timing.median_ratio(times["CABS"], times["SGD"])
        bare = _timing.median_ratio(times["moments"], times["gradient"])
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        cells.append({"batch_size": size, **medians, "loops": loops, "moments_ratio": bare})
        shown = [_report.milliseconds(medians[name]) for name in ("CABS", "SGD")]
        rows.append([str(size), *shown, f"{loops:.2f}", f"{bare:.2f}", f"{loops / bare:.3f}"])
    header = ["mnist_2c2d, m", "CABS step", "SGD step", "ratio", "of the moments", "on top"]
    return _report.markdown(header, rows), cells


def overhead(options: Options) -> tuple[str, Any]:
    """Host time of a step beyond the compiled call, on a net of eight weights and on one of 100."""
    rows, cells = [], []
    for tensors in (1, 100):
        problem = tiny(tensors)
        for lag in (0, 1):
            loop = cabs_loop(problem, 16, 16, lag=lag)
            call = bare_call(problem)
            times = _timing.alternate(
                {"loop": partial(next, loop), "call": partial(next, call)},
                rounds=50,
                seconds=min(options.seconds, 5.0),
            )
            pairs = zip(times["loop"], times["call"], strict=True)
            extra = statistics.median(a - b for a, b in pairs)
            medians = {name: statistics.median(seconds) for name, seconds in times.items()}
            cells.append({"tensors": tensors, "lag": lag, **medians, "overhead": extra})
            shown = [f"{1e6 * x:.0f} µs" for x in (medians["loop"], medians["call"], extra)]
            rows.append([str(tensors), str(lag), *shown])
    header = ["parameter tensors", "lag", "whole step", "compiled call", "overhead"]
    return _report.markdown(header, rows), cells


def compilation(options: Options) -> tuple[str, Any]:
    """Time that a CABS run on digits waits for compilation."""
    rows, cells = [], []
    problem = digits(0)
    for label, sizes in (("on demand", ()), ("ahead of need", SIZES)):
        step = compiled_step(problem, sizes)
        run = train(problem, step, options.steps)
        step.close()
        cell = {
            "compiled": label,
            "seconds": run.seconds,
            "seconds_waited": step.seconds_waited,
            "seconds_in_background": step.seconds_in_background,
            "compilations": step.compilations,
            "largest": max(run.sizes),
        }
        cells.append(cell)
        rows.append(
            [
                label,
                f"{run.seconds:.1f} s",
                f"{step.seconds_waited:.1f} s",
                f"{step.seconds_in_background:.1f} s",
                str(step.compilations),
                str(max(run.sizes)),
            ]
        )
    header = ["digits, compiled", "run", "waited", "in background", "executables", "largest m"]
    return _report.markdown(header, rows), cells


def sequence(options: Options) -> tuple[str, Any]:
    """A CABS run, SGD fed the same sizes, and SGD of a fixed size over as many examples."""
    problem = digits(0)
    step = compiled_step(problem)
    train(problem, step, options.steps)  # compiles
    cabs = train(problem, step, options.steps)
    examples = sum(cabs.sizes)
    seconds = {"CABS": cabs.seconds, "SGD, same sizes": replay(problem, cabs.sizes)}
    for size in FIXED:
        seconds[f"SGD, m = {size}"] = replay(problem, [size] * (examples // size))
    best = min(seconds[f"SGD, m = {size}"] for size in FIXED)
    rows = [
        [name, f"{s:.2f} s", f"{examples / s:,.0f}", f"{s / best:.2f}"]
        for name, s in seconds.items()
    ]
    header = [f"digits, {options.steps} CABS steps", "time", "examples/s", "/ best fixed"]
    return _report.markdown(header, rows), {"examples": examples, "seconds": seconds}


def lag(options: Options) -> tuple[str, Any]:
    """What a lag of one step does to speed, sizes and final loss, over seeds."""
    step = compiled_step(digits(0))
    train(digits(0), step, options.steps)  # compiles
    runs = {
        late: [
            train(digits(seed), step, options.steps, late=late, seed=seed) for seed in range(SEEDS)
        ]
        for late in (0, 1)
    }
    cells, rows = [], []
    for late, group in runs.items():
        rates = [options.steps / run.seconds for run in group]
        final = [statistics.mean(run.losses[-options.steps // 20 :]) for run in group]
        seeds = [_distance(a, b) for a, b in itertools.combinations(group, 2)]
        prompt = [_distance(a, b) for a, b in zip(group, runs[0], strict=True)]
        cell = {
            "lag": late,
            "steps_per_second": statistics.median(rates),
            "mean_batch_size": statistics.mean(statistics.mean(run.sizes) for run in group),
            "loss": statistics.mean(final),
            "loss_spread": statistics.stdev(final),
            "size_distance_to_lag_0": statistics.mean(prompt),
            "size_distance_between_seeds": statistics.mean(seeds),
        }
        cells.append(cell)
        rows.append(
            [
                str(late),
                f"{cell['steps_per_second']:,.0f}",
                f"{cell['mean_batch_size']:.1f}",
                f"{cell['loss']:.5f} ± {cell['loss_spread']:.5f}",
                f"{cell['size_distance_to_lag_0']:.3f}",
                f"{cell['size_distance_between_seeds']:.3f}",
            ]
        )
    header = [
        f"digits, lag ({SEEDS} seeds)",
        "steps/s",
        "mean m",
        "final loss",
        "Δ log m to lag 0",
        "Δ log m between seeds",
    ]
    return _report.markdown(header, rows), cells


def on_device(options: Options) -> tuple[str, Any]:
    """The loop on the device against the host's, steps per second, at two fixed sizes."""
    rows, cells = [], []
    for name, problem in {"eight weights": tiny(1), "digits_mlp": digits(0)}.items():
        data = jax.tree.map(jnp.asarray, problem.data)
        for size in (16, 128):
            optimizer = optimizer_for(size, size)
            steps = min(options.steps, 500)
            loop = jax.jit(
                cabs_jax.on_device_loop(
                    problem.loss,
                    optimizer,
                    microbatch_size=size,
                    max_steps=steps,
                )
            )
            start = problem.params, optimizer.init(problem.params), data, cabs_jax.Position(), steps
            host = cabs_loop(problem, size, size)
            times = _timing.alternate(
                {
                    "host": partial(next, host),
                    "device": completed(loop, *start),
                },
                rounds=15,
                seconds=options.seconds,
            )
            per_second = {
                "host": 1 / statistics.median(times["host"]),
                "device": steps / statistics.median(times["device"]),
            }
            gain = _timing.median_ratio(times["host"], times["device"]) * steps
            cells.append({"net": name, "batch_size": size, **per_second, "gain": gain})
            shown = [f"{per_second[where]:,.0f}" for where in ("host", "device")]
            rows.append([name, str(size), *shown, f"{gain:.1f}"])
    header = ["net", "m", "host loop, steps/s", "on device, steps/s", "gain"]
    return _report.markdown(header, rows), cells


PARTS: dict[str, Callable[[Options], tuple[str, Any]]] = {
    "against_sgd": against_sgd,
    "overhead": overhead,
    "compilation": compilation,
    "sequence": sequence,
    "lag": lag,
    "on_device": on_device,
}


QUICK = Options(100, (16,), 0.5)


def main(
    *,
    parts: Annotated[tuple[str, ...], _report.choice(PARTS)] = tuple(PARTS),
    options: Annotated[Options, Parameter(name="*")] = Options(),
    quick: Flag = False,
    out: Path | None = None,
) -> None:
    """Prints one table for each question.

    Args:
      parts: The questions.
      options: How much to measure.
      quick: Few repeats and short runs.
      out: Writes all numbers as JSON.
    """
    machine = _report.machine("jax", "jaxlib")
    results: dict[str, Any] = {"machine": machine}
    print(machine)
    for part in parts:
        with Console(stderr=True).status(f"bench step: {part}"):
            table, results[part] = PARTS[part](QUICK if quick else options)
        print(f"\n{table}", flush=True)
        _report.write_json(out, results)


def completed(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call that returns when its result is there."""
    return lambda: jax.block_until_ready(function(*args))


def _distance(a: TimedRun, b: TimedRun) -> float:
    """Mean absolute difference of the logarithms of two runs' sizes, step by step."""
    return float(np.mean(np.abs(np.log(a.sizes) - np.log(b.sizes))))
