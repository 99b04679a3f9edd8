"""Says what the moments of a loss cost, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cabs_jax.moments import jaxprs, parameters, split
from cabs_jax.moments.factored import cost
from cabs_jax.moments.factored.choice import Choice, Mode, choose, copies_are_cheap
from cabs_jax.moments.factored.program import Program, shifting, trace_program
from cabs_jax.moments.per_example import loss_and_aux
from cabs_jax.moments.target import Target, platform_named
from cabs_jax.statistics import PyTree, Variance


class Explanation(NamedTuple):
    """How one parameter's share of the squared gradient norm is computed.

    Attributes:
      parameter: Path of the parameter in the tree.
      shape: Its shape.
      primitives: Primitives in which it meets the example.
      form: "one position", "Gram" or "direct" (see `cost`); "small" where its gradient, no larger
        than what it acts on (a bias, a scale), is held for every example; "per example" where a
        large one is; "mean only" where it only adds the same to the loss of every example, as a
        penalty does; "unused" where the loss does not depend on it.
      extra_flops: Operations per example on top of the plain gradient's.
      relative_flops: The same as a fraction of what the plain gradient spends on this parameter,
        forward and backward; NaN where that is not known.
      bytes_per_example: Memory for one example while it is measured.
      reason: Why this form, where it is not a single use that a rule covers.
    """

    parameter: str
    shape: tuple[int, ...]
    primitives: tuple[str, ...]
    form: str
    extra_flops: int
    relative_flops: float
    bytes_per_example: int
    reason: str


def explain(
    loss_fn: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    *,
    variance: Variance = "trace",
    has_aux: bool = False,
) -> tuple[Explanation, ...]:
    """Prints, for every parameter, how `gradient_moments` measures it and what that costs.

    Nothing is computed: the loss is traced for one example, so shapes suffice
    (`jax.ShapeDtypeStruct`).

    Args:
      loss_fn: `loss_fn(params, example) -> loss`, or `(loss, aux)` with `has_aux`.
      params: Parameters.
      example: One example, without a batch axis.
      variance: "trace", "by_parameter" or "diagonal".
      has_aux: Whether `loss_fn` returns auxiliary data.

    Returns:
      The rows of the table.

    Raises:
      TypeError: If the loss is not a scalar, or a parameter is complex.
      ValueError: If `variance` is none of these.

    Example:
      >>> import cabs_jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return jnp.sum((example @ params["w"] + params["b"]) ** 2)
      >>> params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
      >>> rows = cabs_jax.explain(loss_fn, params, jnp.zeros(8))
      parameter  shape  primitives   form          extra flops  of plain  bytes/example  reason
      ['b']      4      add          small                   8         –             16
      ['w']      8×4    dot_general  one position           24      0.12             48
      total                                                 32                       64
    """
    split.check_options("factored", variance, None, None, None)
    parts = parameters.split(params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), example)

    def of_all(given: tuple[PyTree, list[jax.Array]], example: PyTree) -> Any:
        arrays = jax.lax.stop_gradient(given[1])  # running averages, say
        loss = parameters.of_parameters(loss_and_aux(loss_fn, has_aux), parts, arrays)
        return loss(given[0], example)

    program = trace_program(of_all, (parts.parameters, parts.arrays), batch)
    paths = jax.tree_util.tree_leaves_with_path(parts.parameters)
    choices = choose(program, len(paths) + len(parts.arrays), variance)[: len(paths)]
    penalised = shifting(program.body)
    rows = tuple(
        _row(program, choice, jax.tree_util.keystr(path), jax.numpy.shape(leaf), i in penalised)
        for i, ((path, leaf), choice) in enumerate(zip(paths, choices, strict=True))
    )
    print(_table(rows))
    return rows


def _row(
    program: Program, choice: Choice, parameter: str, shape: tuple[int, ...], penalised: bool
) -> Explanation:
    sites = [program.sites[number] for number in choice.sites]
    names = {jaxprs.name(site.equation) if site.equation else "loss" for site in sites}
    unused = "mean only" if penalised else "unused"
    known = Explanation(parameter, shape, tuple(sorted(names)), unused, 0, math.nan, 0, "")
    if choice.mode is Mode.UNUSED:
        return known
    if choice.mode is Mode.PER_EXAMPLE:
        small = all(site.rule is None and copies_are_cheap(site) for site in sites)
        return known._replace(
            form="small" if small else "per example",
            extra_flops=2 * math.prod(shape),
            bytes_per_example=4 * math.prod(shape),
            reason="" if small else choice.reason,
        )
    sizes = [use.sizes() for use in choice.uses]
    if choice.mode is Mode.COLLECTED:
        groups, _, p, q = sizes[0]
        sizes = [(groups, sum(positions for _, positions, _, _ in sizes), p, q)]
    forms, flops, memory = zip(*map(_cost, sizes), strict=True)
    plain = sum(6 * math.prod(size) for size in sizes)
    return known._replace(
        form="/".join(dict.fromkeys(forms)),
        extra_flops=sum(flops),
        relative_flops=sum(flops) / plain,
        bytes_per_example=max(memory),
        reason=choice.reason,
    )


def _cost(sizes: cost.Sizes) -> tuple[str, int, int]:
    """The form, the extra operations and the bytes for one example."""
    groups, positions, p, q = sizes
    direct = cost.prefers_direct(sizes, Target(platform_named(jax.default_backend())))
    memory = cost.norm_bytes(sizes, direct=direct)
    if positions == 1:
        return "one position", 2 * groups * (p + q), 4 * groups * (p + q)
    if direct:
        return "direct", 3 * groups * p * q, memory
    return "Gram", 2 * groups * positions**2 * (p + q), memory


def _table(rows: tuple[Explanation, ...]) -> str:
    header = (
        "parameter",
        "shape",
        "primitives",
        "form",
        "extra flops",
        "of plain",
        "bytes/example",
        "reason",
    )
    lines = [header]
    for row in rows:
        known = not math.isnan(row.relative_flops)
        lines.append(
            (
                row.parameter,
                "×".join(map(str, row.shape)) or "scalar",
                ", ".join(row.primitives),
                row.form,
                f"{row.extra_flops:,}",
                f"{row.relative_flops:.2f}" if known else "–",
                f"{row.bytes_per_example:,}",
                row.reason,
            )
        )
    flops, memory = sum(r.extra_flops for r in rows), sum(r.bytes_per_example for r in rows)
    lines.append(("total", "", "", "", f"{flops:,}", "", f"{memory:,}", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = {4, 5, 6}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
