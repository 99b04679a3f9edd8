"""What it costs to measure a parameter, in operations on top of those of the plain gradient.

Counted from shapes, for one example, in the conventions of `flops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from cabs_jax.moments import flops, jaxprs
from cabs_jax.moments.factored import cost, forms, views
from cabs_jax.moments.factored.choice import (
    Choice,
    Mode,
    Use,
    copies_are_cheap,
    product_of,
)
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.factored.pulled_back import (
    bytes_needed,
    numbers_of,
    operands_at,
    pulled_back,
)
from cabs_jax.moments.factored.sorted_loss import (
    CONSTANT,
    Kind,
    Parameter,
    Program,
    Site,
    SortedJaxpr,
    Step,
)
from cabs_jax.moments.factored.values import Sample
from cabs_jax.moments.target import Target
from cabs_jax.statistics import Variance

Leaves = frozenset[int]


class Price(NamedTuple):
    """What it costs to measure one parameter for one example.

    Attributes:
      forms: The forms in which its norm or its squares are taken.
      extra: Operations on top of the plain gradient's.
      plain: Operations of the plain gradient at its sites, forward and backward.
      bytes: Memory while it is measured.
      sizes: For each use, (groups, positions, p, q).
      reason: Why it is more than it would be for a parameter as it is.
    """

    forms: tuple[str, ...]
    extra: int
    plain: int
    bytes: int
    sizes: tuple[cost.Sizes, ...] = ()
    reason: str = ""


def of_uses(leaf: int, choice: Choice, variance: Variance, target: Target) -> Price:
    """The price of a parameter that is measured through factors."""
    uses = choice.uses
    if choice.mode is Mode.IN_PLACE:
        products = [product_of(use.site, choice, variance) for use in uses]
        parts = [
            _in_place(use, variance, target) if product is None else _at_product(product)
            for use, product in zip(uses, products, strict=True)
        ]
        shares = [_share(leaf, use) * math.prod(use.site.scans) for use in uses]
        sizes = tuple(use.rule.sizes() for use in uses)
        return Price(
            tuple(dict.fromkeys(form for part in parts for form in part.forms)),
            round(sum(part.extra * share for part, share in zip(parts, shares, strict=True))),
            round(sum(_plain(use) * share for use, share in zip(uses, shares, strict=True))),
            max(part.bytes for part in parts),
            sizes,
            "" if all(products) else _why(uses, variance),
        )
    plain = sum(_plain(use) * math.prod(use.site.scans) for use in uses)
    groups, _, p, q = uses[0].sizes()
    lengths = [use.sizes()[1] for use in uses]
    size = groups, sum(lengths), p, q
    direct = cost.prefers_direct(size, target)
    memory = cost.norm_bytes(size, direct=direct)
    if direct:  # the gradients formed here are not those of the batch
        extra = 2 * math.prod(size) + (2 + len(uses)) * groups * p * q
        return Price(("direct",), extra, plain, memory, (size,))
    pairs = sum(s * t for i, s in enumerate(lengths) for t in lengths[: i + 1])
    across = sum(q if use.rule.one_hot else p + q for use in uses) // len(uses)
    return Price(("Gram",), groups * pairs * (2 * across + 3), plain, memory, (size,))


def _plain(use: Use) -> int:
    """Operations of the plain gradient at a site, forward and backward."""
    groups, positions, p, q = use.rule.sizes()
    # Rows are looked up without a product, and theirs added to the gradient.
    return positions * q if use.rule.one_hot else 6 * groups * positions * p * q


def _why(uses: tuple[Use, ...], variance: Variance) -> str:
    """Why parameters cost more than in a product with them as they are."""
    if any(use.rule.apart for use in uses):
        return "every example reads rows of its own, once more"
    if variance != "diagonal" and any(views.is_weighted(use.view) for use in uses):
        return "its entries are multiplied by different constants"
    return ""


def _share(leaf: int, use: Use) -> float:
    """The part of what a use sees that is of this parameter."""
    entries = [math.prod(n for axis in p.axes for n, _ in axis) for p in views.pieces(use.view)]
    of_leaf = [n for p, n in zip(views.pieces(use.view), entries, strict=True) if p.leaf == leaf]
    return sum(of_leaf) / max(sum(entries), 1)


def _at_product(rule: Rule) -> Price:
    """The price of what is picked, where its norm is taken at the product that it goes into."""
    groups, _, p, q = rule.sizes()
    return Price(("one position",), 2 * groups * (p + q), 0, 4 * groups * (p + q))


def _in_place(use: Use, variance: Variance, target: Target) -> Price:
    sizes, rule = use.rule.sizes(), use.rule
    groups, t, p, q = sizes
    weighted = views.is_weighted(use.view)
    norms_alone = variance != "diagonal" and not weighted
    if norms_alone and forms.is_by_kernel(use.site.equation, rule, target):
        return Price(("kernel",), 3 * groups * p * q, 0, 0)
    direct = not rule.one_hot and t > 1
    if norms_alone and direct | rule.one_hot:
        direct = not rule.apart and forms.is_direct(use.site.equation, rule, target)
    memory = cost.norm_bytes(sizes, direct=direct, one_hot=rule.one_hot)
    if direct:  # squares, their sum, and that of the gradients; products with padding
        padding = 0
        if jaxprs.name(use.site.equation) == "conv_general_dilated":
            padding = 2 * math.prod(sizes) - flops.of_equation(use.site.equation)
        return Price(("direct",), (4 if weighted else 3) * groups * p * q + padding, 0, memory)
    if rule.one_hot and (rule.apart or t == 1):
        return Price(("one position",) if t == 1 else ("rows",), 2 * t * q, 0, 4 * t * q)
    if rule.pooled and (norms_alone or variance == "diagonal"):
        return _pooled(rule, target, variance)
    if forms.is_sorted(rule, target):
        return Price(("sorted",), 3 * t * q, 0, cost.sorting_bytes(sizes))
    if t > 1:
        across = q if rule.one_hot else p + q
        return Price(("Gram",), groups * t**2 * (2 * across + 3), 0, memory)
    products = 2 * p * q if weighted or variance == "diagonal" else 0
    return Price(("one position",), groups * (2 * (p + q) + products), 0, 4 * groups * (p + q))


def _pooled(rule: Rule, target: Target, variance: Variance) -> Price:
    """The price of what is pooled: its rows become multiples of one, and these are added up."""
    _, t, p, q = rule.sizes()
    in_table, squares = forms.is_in_table(rule, target), 0
    if variance == "diagonal":
        squares = 2 * p * q if in_table else 2 * t * q
    if in_table:
        form, added_up = "direct", 2 * p
    elif forms.is_sorted(rule, target):
        form, added_up = "sorted", 3 * t
    else:
        form, added_up = "Gram", 5 * t**2
    return Price((form,), 2 * t * q + added_up + squares, 0, forms.pooled_bytes(rule, target))


def of_held(sites: Sequence[Site], size: int, pulled: int) -> Price:
    """The price of a parameter of so many entries whose gradients are held for every example.

    Args:
      sites: Where it meets the example.
      size: Its number of entries.
      pulled: What it costs to pull its gradients back through functions of it.
    """
    small = not pulled and all(site.rule is None and copies_are_cheap(site) for site in sites)
    extra, plain = 3 * size + pulled, 0
    for site in sites:
        repeats = math.prod(site.scans)
        if site.rule is not None:
            plain += repeats * 6 * math.prod(site.rule.sizes())
            # Added up over sites and steps; of one position, where the plain gradient is a product
            # over the batch, the gradient of an example has no more than its entries.
            added = len(sites) * repeats > 1
            extra += repeats * size * (added - (site.rule.positions == 1))
        elif site.equation is not None and jaxprs.name(site.equation) != "scan":
            plain += 3 * repeats * flops.of_equation(site.equation)
    return Price(("small" if small else "per example",), extra, 0 if small else plain, 4 * size)


def of_pulled_back(
    program: Program,
    choices: Sequence[Choice],
    leaves: Sequence[Any],
    variance: Variance,
    target: Target,
) -> dict[int, Price]:
    """The prices of parameters whose gradients are pulled back from what is collected, by number.

    Args:
      program: The sorted loss.
      choices: How each parameter is measured.
      leaves: What each parameter looks like.
      variance: What is measured.
      target: The machine.
    """
    sites = {n: program.sites[n] for n in numbers_of(choices)}

    def operations(leaf: int, examples: int) -> int:
        def squares(leaves: Sequence[jax.Array], operands: dict[int, Any]) -> jax.Array:
            sample = Sample(examples, (), target)
            found = pulled_back(program, choices, leaves, operands, variance, sample)
            return found[leaf]

        operands = {
            n: tuple(jax.ShapeDtypeStruct((examples, *a.shape), a.dtype) for a in operands_at(site))
            for n, site in sites.items()
        }
        return flops.flops(squares, list(leaves), operands)

    prices = {}
    for leaf, choice in enumerate(choices):
        if choice.mode is Mode.PULLED_BACK:
            own = [sites[n] for n in choice.sites]
            # What is done once for all examples is in both.
            extra = operations(leaf, 3) - operations(leaf, 2)
            plain = sum(6 * math.prod(site.rule.sizes()) for site in own if site.rule)
            prices[leaf] = Price(("pulled back",), extra, plain, bytes_needed(own, target))
    return prices


def pulled_through(program: Program, held: Leaves) -> dict[int, int]:
    """Operations to pull gradients back through functions of parameters, for those that are held.

    The plain gradient does so once for the whole batch, and here it is once for each example.
    """
    found: dict[int, int] = {}
    _pull(program.body, found, held, 1)
    return found


def _pull(body: SortedJaxpr, found: dict[int, int], held: Leaves, repeats: int) -> list[Any]:
    """Goes through a sorted jaxpr with the parameters of its values; None of what is not shared."""

    def visit(step: Step, operands: list[Leaves | None]) -> list[Leaves | None]:
        equation, inner = step.equation, step.inner
        if inner is not None:
            scanned = equation.params["length"] if step.kind is Kind.SCAN else 1
            return _pull(inner, found, held, repeats * scanned)
        shared = [leaves for leaves in operands if leaves is not None]
        if len(shared) < len(operands) or step.kind is Kind.SITE:
            return [None] * len(equation.outvars)
        leaves = Leaves().union(*shared)
        if step.kind is Kind.PLAIN and leaves & held and jaxprs.name(equation) != "stop_gradient":
            places = [i for i, own in enumerate(operands) if own and own & held]
            price = repeats * _of_pull(equation, places)
            for leaf in leaves & held:
                found[leaf] = found.get(leaf, 0) + price // len(leaves & held)
        gradient = jaxprs.name(equation) != "stop_gradient"
        return [leaves if gradient else Leaves()] * len(equation.outvars)

    inputs = [_leaves_of(origin) for origin in body.inputs]
    return jaxprs.walk(body.jaxpr, body.consts, inputs, body.steps, visit, lambda _: Leaves())


def _leaves_of(origin: Any) -> Leaves | None:
    if isinstance(origin, Parameter):
        return origin.leaves
    return Leaves() if origin is CONSTANT else None


def _of_pull(equation: jaxprs.Equation, places: Sequence[int]) -> int:
    """Operations of one product with the transposed Jacobian, by the operands at some places."""
    avals = dict(enumerate(v.aval for v in equation.invars))
    floating = [v.aval for v in equation.outvars if jaxprs.carries_gradient(v)]

    def pull(operands: dict[int, jax.Array], cotangents: list[jax.Array]) -> Any:
        arguments = {i: operands[i] for i in places}
        return jax.vjp(lambda own: jaxprs.floating_outputs(equation, operands | own), arguments)[1](
            cotangents
        )

    return flops.flops(pull, avals, floating)
