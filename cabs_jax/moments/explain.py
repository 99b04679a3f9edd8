"""Says what the moments of a loss cost, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cabs_jax.moments import jaxprs, parameters, split
from cabs_jax.moments.factored import price
from cabs_jax.moments.factored.choice import Mode, choose
from cabs_jax.moments.factored.program import trace_program
from cabs_jax.moments.factored.sorted_loss import shifting
from cabs_jax.moments.gradient_moments import gradient_moments
from cabs_jax.moments.per_example import loss_and_aux
from cabs_jax.moments.target import (
    Kernels,
    Platform,
    Target,
    check_platform,
    platform_named,
    with_kernels,
)
from cabs_jax.statistics import PyTree, Variance


class Explanation(NamedTuple):
    """How one parameter's share of the squared gradient norm is computed.

    Attributes:
      parameter: Path of the parameter in the tree.
      shape: Its shape.
      primitives: Primitives in which it meets the example.
      form: "one position", "Gram", "direct" or "sorted" (see `cost`); "kernel" where one makes both
        the norm and the mean; "rows" where it is looked up once; "small" where its gradient, no
        larger than what it acts on (a bias, a scale), is held for every example; "per example"
        where a large one is; "mean only" where it only adds the same to the loss of every example,
        as a penalty does; "no gradient" where it is used and nothing comes back to it; "unused"
        where it is not.
      extra_flops: Operations per example on top of the plain gradient's, by shapes: two for a
        product in a contraction, one for any other number.
      relative_flops: The same as a fraction of what the plain gradient spends on this parameter,
        forward and backward; NaN where that is not known.
      bytes_per_example: Memory for one example while it is measured.
      reason: Why this form, where it is not a single use that a rule covers, or where it adds more
        than half of the plain gradient's operations.
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
    platform: Platform | None = None,
    kernels: Kernels = False,
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
      platform: What is compiled for, "cpu", "gpu" or "tpu"; by default JAX's default backend.
      kernels: Whether kernels are used where there are some, as in `gradient_moments`.

    Returns:
      The rows of the table.

    Raises:
      TypeError: If the loss is not a scalar, or a parameter is complex.
      ValueError: If `variance` is none of these, the platform unknown, or without kernels.
      Exception: Whatever `gradient_moments` raises, as where the loss cannot be vmapped.

    Example:
      >>> import cabs_jax, jax.numpy as jnp
      >>> def loss_fn(params, example):
      ...     return jnp.sum((example @ params["w"] + params["b"]) ** 2)
      >>> params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
      >>> rows = cabs_jax.explain(loss_fn, params, jnp.zeros(8))
          on cpu, variance='trace'
      parameter  shape  primitives   form          extra flops  of plain  bytes/example  reason
      ['b']      4      add          small                  12         –             16
      ['w']      8×4    dot_general  one position           24      0.12             48
      total                                                 36                       64
    """
    split.check_options("factored", variance, None, None)
    check_platform(platform)
    target = with_kernels(Target(platform or platform_named(jax.default_backend())), kernels)
    parts = parameters.split(params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), example)

    def of_all(given: tuple[PyTree, list[jax.Array]], example: PyTree) -> Any:
        arrays = jax.lax.stop_gradient(given[1])  # running averages, say
        loss = parameters.of_parameters(loss_and_aux(loss_fn, has_aux), parts, arrays)
        return loss(given[0], example)

    def moments(given: tuple[PyTree, list[jax.Array]], batch: PyTree) -> Any:
        measure = gradient_moments(
            loss_fn, variance=variance, has_aux=has_aux, platform=platform, kernels=kernels
        )
        return measure(parts.rebuild(*given), batch)

    given = parts.parameters, parts.arrays
    jaxprs.trace(moments, given, batch)  # raises what there is to raise
    program = trace_program(of_all, given, batch)
    used = jaxprs.needed(program.body.jaxpr)[1]
    leaves = jax.tree_util.tree_leaves_with_path(parts.parameters)
    arrays = jax.tree.leaves(given)
    choices = choose(program, len(arrays), variance)
    behind = price.of_pulled_back(program, choices, arrays, variance, target)
    held = frozenset(i for i, c in enumerate(choices) if c.mode is Mode.PER_EXAMPLE)
    pulled, penalised = price.pulled_through(program, held), shifting(program.body)
    rows = []
    for i, ((path, leaf), choice) in enumerate(zip(leaves, choices[: len(leaves)], strict=True)):
        sites = [program.sites[number] for number in choice.sites]
        names = {jaxprs.name(site.equation) if site.equation else "loss" for site in sites}
        unmeasured = "mean only" if i in penalised else "no gradient" if used[i] else "unused"
        row = Explanation(
            jax.tree_util.keystr(path),
            leaf.shape,
            tuple(sorted(names)),
            unmeasured,
            0,
            math.nan,
            0,
            choice.reason if choice.mode is not Mode.UNUSED else "",
        )
        if choice.mode is Mode.PER_EXAMPLE:
            row = _priced(row, price.of_held(sites, math.prod(leaf.shape), pulled.get(i, 0)))
        elif choice.mode is Mode.PULLED_BACK:
            row = _priced(row, behind[i])
        elif choice.mode is not Mode.UNUSED:
            row = _priced(row, price.of_uses(i, choice, variance, target))
        rows.append(row)
    print(f"on {target.platform}, variance={variance!r}\n{_table(tuple(rows))}")
    return tuple(rows)


def _priced(row: Explanation, priced: price.Price) -> Explanation:
    relative = priced.extra / priced.plain if priced.plain else math.nan
    reason = "" if "small" in priced.forms else row.reason or priced.reason
    if relative > 0.5 and not reason:
        sizes = (f"{t} of {p}×{q}" for _, t, p, q in priced.sizes)
        reason = f"little work: positions {', '.join(dict.fromkeys(sizes))}"
    return row._replace(
        form="/".join(priced.forms),
        extra_flops=priced.extra,
        relative_flops=relative,
        bytes_per_example=priced.bytes,
        reason=reason,
    )


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
