"""Which way the gradient norm of each parameter is taken."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import views
from cabs_jax.moments.factored.cost import Sizes
from cabs_jax.moments.factored.primitives import Rule
from cabs_jax.moments.factored.sorted_loss import Parameter, Program, Site
from cabs_jax.moments.rewriting import convolves
from cabs_jax.statistics import Variance

LARGEST_INDEX = 2**24  # whole numbers up to here survive as float32


class Mode(enum.Enum):
    """How the per-example gradients of one parameter are measured.

    Attributes:
      UNUSED: The loss does not depend on it: its gradient is zero.
      IN_PLACE: Its uses touch separate entries: the norm is taken where each use is
        differentiated, from one use's factors alone.
      COLLECTED: It is used several times in one layout: the factors of all uses are collected, and
        the norm of their sum, cross terms included, is taken at the end.
      PULLED_BACK: It meets the examples behind functions of it: what the factors of all uses are
        made of is collected, and the norm is taken at the end of what these functions pull back.
      PER_EXAMPLE: No rule covers all of its uses: its gradient is held for every example.
    """

    UNUSED = "unused"
    IN_PLACE = "in place"
    COLLECTED = "collected"
    PULLED_BACK = "pulled back"
    PER_EXAMPLE = "per example"


class Use(NamedTuple):
    """A use of a parameter at a site whose rule gives the factors of its gradient.

    Attributes:
      number: The number of the site.
      site: The site.
      rule: Its rule.
      view: The parameter as the rule looks at it, in the rule's shape.
    """

    number: int
    site: Site
    rule: Rule
    view: views.Seen

    def sizes(self) -> Sizes:
        """Returns (groups, positions, p, q), every step of the scans around it counted."""
        groups, positions, p, q = self.rule.sizes()
        return groups, positions * math.prod(self.site.scans), p, q

    def layout(self) -> Layout | None:
        """What two uses must share for their outer products to be added up as factors.

        These are the entries of the parameter that the groups, the left and the right factor run
        through, and where they start. None where there is no such order, or no room for it.
        """
        rule, view = self.rule, self.view
        if isinstance(view, views.Mosaic):
            return None
        sides = rule.groups, rule.left, rule.right
        if not all(views.in_order(view, side) for side in sides):
            return None
        if rule.one_hot and rule.sizes()[2] > LARGEST_INDEX:
            return None
        groups, left, right = (views.layout(view, side) for side in sides)
        return groups, frozenset([left, right]), view.offset


Layout = tuple[tuple[views.Dim, ...], frozenset[tuple[views.Dim, ...]], int]


class Choice(NamedTuple):
    """How a parameter is measured.

    Attributes:
      mode: The way chosen.
      reason: Why, where it is not the obvious one.
      sites: Numbers of the sites where it meets the example.
      uses: The same as uses of rules, where the mode is IN_PLACE or COLLECTED.
    """

    mode: Mode
    reason: str
    sites: tuple[int, ...]
    uses: tuple[Use, ...] = ()


def choose(program: Program, num_params: int, variance: Variance) -> tuple[Choice, ...]:
    """Chooses a mode for every parameter leaf."""
    found: list[list[tuple[int, Parameter]]] = [[] for _ in range(num_params)]
    for number, site in enumerate(program.sites):
        for _, parameter in site.parameters:
            for leaf in parameter.leaves:
                found[leaf].append((number, parameter))
    sites = program.sites
    choices = [_choose(sites, leaf, at, variance) for leaf, at in enumerate(found)]
    joined = [p.leaves for at in found for _, p in at if len(p.leaves) > 1]
    if variance == "by_parameter":  # the norm at a site is that of all that it joins
        for leaf in frozenset[int]().union(*joined):
            if choices[leaf].mode is not Mode.PER_EXAMPLE:
                numbers = choices[leaf].sites
                choices[leaf] = _without_rules(sites, numbers, "joined to another", variance)
    while behind := _behind_one_operand(joined, choices):
        for leaf, mode in behind.items():
            reason, numbers = f"joined to one that is {DONE[mode]}", choices[leaf].sites
            if mode is Mode.PULLED_BACK:
                choices[leaf] = _without_rules(sites, numbers, reason, variance)
            else:
                choices[leaf] = Choice(mode, reason, numbers)
    return tuple(choices)


DONE = {Mode.PULLED_BACK: "pulled back", Mode.PER_EXAMPLE: "held"}


def _behind_one_operand(joined: list[frozenset[int]], choices: list[Choice]) -> dict[int, Mode]:
    """Parameters behind one operand with another that is held or pulled back, but are not so."""
    found: dict[int, Mode] = {}
    for leaves in joined:
        modes = [choices[leaf].mode for leaf in leaves]
        mode = next((mode for mode in (Mode.PER_EXAMPLE, Mode.PULLED_BACK) if mode in modes), None)
        if mode is not None:
            found |= {leaf: mode for leaf in leaves if choices[leaf].mode is not mode}
    return found


def _choose(
    sites: tuple[Site, ...], leaf: int, found: list[tuple[int, Parameter]], variance: Variance
) -> Choice:
    """Chooses a mode for a parameter that was found at some sites, by number."""
    numbers = tuple(dict.fromkeys(number for number, _ in found))
    if not found:
        return Choice(Mode.UNUSED, "the loss does not depend on it", ())
    uses: list[Use] = []
    for number, parameter in found:
        use = _use(number, sites[number], parameter)
        if isinstance(use, str):
            return _without_rules(sites, numbers, use, variance)
        uses.append(use)
    pieces = [piece for use in uses for piece in views.pieces(use.view)]
    seen = [piece for piece in pieces if piece.leaf == leaf]
    once = all(view.repeats == 1 for view in seen)
    if once and views.apart(seen):
        return Choice(Mode.IN_PLACE, "", numbers, tuple(uses))
    reason = f"{len(uses)} uses" if len(uses) > 1 else "used in every step of a scan"
    # Squares of entries need the whole gradient; so do slices that a scan takes in turn.
    if variance == "diagonal" or any(view.looped for view in seen):
        return Choice(Mode.PER_EXAMPLE, reason, numbers)
    layouts = {use.layout() for use in uses}
    if len(layouts) == 1 and None not in layouts:
        return Choice(Mode.COLLECTED, reason, numbers, tuple(uses))
    return _without_rules(sites, numbers, "its uses overlap in different layouts", variance)


def _without_rules(
    sites: tuple[Site, ...], numbers: tuple[int, ...], reason: str, variance: Variance
) -> Choice:
    """The choice for a parameter whose gradient does not follow from factors alone."""
    collected = all(_collects(sites[number], variance) for number in numbers)
    mode = Mode.PULLED_BACK if collected else Mode.PER_EXAMPLE
    return Choice(mode, reason, numbers)


def _collects(site: Site, variance: Variance) -> bool:
    """Whether what the gradient of a weight is made of can be collected at a site."""
    if site.rule is None or site.rule.one_hot or site.scans:
        return False
    # Of several positions, squares of entries need the whole gradient.
    return variance != "diagonal" or site.rule.positions == 1


def _use(number: int, site: Site, parameter: Parameter) -> Use | str:
    """The use of a parameter at a site, or why its gradient there does not come as factors."""
    primitive = jaxprs.name(site.equation) if site.equation else "the loss"
    if site.rule is None:
        return f"no rule for {primitive}"
    if parameter.view is None:
        return f"a computed weight of {primitive}"
    return Use(number, site, site.rule, views.shown(parameter.view, site.rule.shape))


def product_of(site: Site, choice: Choice, variance: Variance) -> Rule | None:
    """The rule of the product where the norm of what is picked at a site is taken, if it is there.

    That product is its only use. So what the gradient is made of is known there, and need not be
    multiplied out, as it must where it is put to its place in the parameter's.
    """
    as_it_is = all(isinstance(parameter.view, views.View) for _, parameter in site.parameters)
    if variance == "diagonal" or choice.mode is not Mode.IN_PLACE or not as_it_is:
        return None
    met = site.met[0] if len(site.met) == 1 else None
    return met if isinstance(met, Rule) else None


def copies_are_cheap(site: Site) -> bool:
    """Whether a copy of the parameters for each example is no larger than what the site puts out.

    Where there is a convolution, such copies would make a convolution of two batched operands.
    """
    if site.equation is None or jaxprs.name(site.equation) == "scan":
        return True
    if convolves(site.equation):
        return False
    copied = sum(site.equation.invars[place].aval.size for place, _ in site.parameters)
    return bool(copied <= sum(out.aval.size for out in site.equation.outvars))
