"""Which way the gradient norm of each parameter is taken."""

from __future__ import annotations

import enum
from typing import NamedTuple

from cabs_jax.moments.factored import views
from cabs_jax.moments.factored.program import Parameter, Plan, Site
from cabs_jax.moments.rewriting import convolves
from cabs_jax.statistics import Variance

LARGEST_INDEX = 2**24


class Mode(enum.Enum):
    """How the per-example gradients of one parameter are measured.

    Attributes:
      UNUSED: The loss does not depend on it: its gradient is zero.
      IN_PLACE: Its uses touch separate entries: the norm is taken where each use is
        differentiated, from one use's factors alone.
      COLLECTED: It is used several times in one layout: the factors of all uses are collected, and
        the norm of their sum, cross terms included, is taken at the end.
      PER_EXAMPLE: No rule covers all of its uses: its gradient is held for every example.
    """

    UNUSED = "unused"
    IN_PLACE = "in place"
    COLLECTED = "collected"
    PER_EXAMPLE = "per example"


class Choice(NamedTuple):
    """The way chosen for a parameter, the reason, and the sites that use it."""

    mode: Mode
    reason: str
    sites: tuple[int, ...]


def choose(plan: Plan, num_params: int, variance: Variance) -> tuple[Choice, ...]:
    """Chooses a mode for every parameter leaf."""
    uses: list[list[tuple[int, Parameter]]] = [[] for _ in range(num_params)]
    for number, site in enumerate(plan.sites):
        for _, parameter in site.weights:
            for leaf in parameter.leaves:
                uses[leaf].append((number, parameter))
    return tuple(_choose(plan.sites, found, variance) for found in uses)


def weight(site: Site) -> tuple[Parameter, views.View]:
    """Returns the only weight of a site that has a rule, and its view in the rule's shape."""
    ((_, parameter),) = site.weights
    assert parameter.view is not None
    assert site.rule is not None
    view = views.reshaped(parameter.view, site.rule.shape)
    assert view is not None
    return parameter, view


def _choose(
    sites: tuple[Site, ...], found: list[tuple[int, Parameter]], variance: Variance
) -> Choice:
    numbers = tuple(dict.fromkeys(number for number, _ in found))
    if not found:
        return Choice(Mode.UNUSED, "the loss does not depend on it", ())
    for number, parameter in found:
        reason = _no_factors(sites[number], parameter)
        if reason:
            return Choice(Mode.PER_EXAMPLE, reason, numbers)
    seen = [weight(sites[number])[1] for number in numbers]
    once = all(view.repeats == 1 for view in seen)
    apart = all(views.disjoint(a, b) for i, a in enumerate(seen) for b in seen[:i])
    if once and apart:
        return Choice(Mode.IN_PLACE, "", numbers)
    layouts = {layout(sites[number]) for number in numbers}
    if variance == "diagonal" or any(view.looped for view in seen):
        return Choice(Mode.PER_EXAMPLE, f"{len(numbers)} uses", numbers)
    if len(layouts) == 1 and None not in layouts:
        return Choice(Mode.COLLECTED, f"{len(numbers)} uses", numbers)
    return Choice(Mode.PER_EXAMPLE, "its uses overlap in different layouts", numbers)


def layout(site: Site) -> tuple[object, ...] | None:
    """What two uses of a parameter must share for their outer products to be added as factors."""
    rule, (_, view) = site.rule, weight(site)
    assert rule is not None
    axes = rule.groups, rule.left, rule.right
    if not all(views.in_order(view, side) for side in axes):
        return None
    if rule.one_hot and rule.sizes()[2] > LARGEST_INDEX:
        return None
    groups, left, right = (views.layout(view, side) for side in axes)
    return groups, frozenset([left, right]), view.offset


def _no_factors(site: Site, parameter: Parameter) -> str:
    """Says why a use of a parameter does not come as factors; empty if it does."""
    primitive = site.equation.primitive.name if site.equation else "the loss"
    if site.rule is None:
        return f"no rule for {primitive}"
    if parameter.view is None:
        return f"a computed weight of {primitive}"
    if views.reshaped(parameter.view, site.rule.shape) is None:
        return f"an unusual view in {primitive}"
    return ""


def copies_are_cheap(site: Site) -> bool:
    """Whether a copy of the weights for each example is no larger than what the site puts out.

    Where there is a convolution, such copies would make a convolution of two batched operands.
    """
    if site.equation is None or site.equation.primitive.name == "scan":
        return True
    if convolves(site.equation):
        return False
    weights = sum(site.equation.invars[operand].aval.size for operand, _ in site.weights)
    return bool(weights <= sum(out.aval.size for out in site.equation.outvars))
