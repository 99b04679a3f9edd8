"""What a sorted per-example loss is made of.

By the chain rule, the gradient of a parameter is the sum of what comes back from its *sites*, the
equations where it meets the example. `program` finds them, and sorts the others around them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import primitives, views


class Parameter(NamedTuple):
    """What is known of a value that depends on parameters alone.

    Attributes:
      leaves: The parameters it depends on.
      view: How it looks at them, where it does no more than look.
    """

    leaves: frozenset[int]
    view: views.Seen | None


class Example(NamedTuple):
    """Marks a value that depends on the example.

    Attributes:
      alike: Axes along which it is known to be the same.
    """

    alike: frozenset[int] = frozenset()


class Constant:
    """Marks a value that depends on neither, or through which no gradient flows."""


class Picked(NamedTuple):
    """Marks a value of the example's own that is a part of a parameter.

    Attributes:
      site: The number of the site where it was looked up.
      rows: Where it may show an entry twice, the axes along which look-ups differ, and each of them
        may have been multiplied by a number; None where it shows every entry once and as it is.
    """

    site: int
    rows: tuple[int, ...] | None


EXAMPLE, CONSTANT = Example(), Constant()
Origin = Parameter | Picked | Example | Constant
POOLED: Final = "pooled"
Met = primitives.Rule | Literal["pooled"] | None


class Kind(enum.Enum):
    """How an equation is evaluated for a batch."""

    PLAIN = enum.auto()  # as it is, vmapped over what depends on the example
    VIEW = enum.auto()  # does no more than look at parameters
    SITE = enum.auto()  # parameters meet the example
    SHIFT = enum.auto()  # parameters add the same to the loss of every example
    CALL = enum.auto()  # walk into the jaxpr inside
    CHECKPOINT = enum.auto()  # walk into it, and keep it rematerialised
    SCAN = enum.auto()  # walk into its body


class Step(NamedTuple):
    """One equation of a sorted jaxpr.

    Attributes:
      kind: How it is evaluated.
      equation: The equation.
      inner: The sorted jaxpr inside it, if the walk goes there.
      site: Its number, if it is a site.
      leaves: The parameters that a shift depends on.
      viewed: The places of the operands that a view looks at; the others are constants.
      picked: For operands that were picked from parameters, and of whose gradients the norm is
        known here: their places and the numbers of their sites.
    """

    kind: Kind
    equation: jaxprs.Equation
    inner: SortedJaxpr | None = None
    site: int = -1
    leaves: frozenset[int] = frozenset()
    viewed: tuple[int, ...] = ()
    picked: tuple[tuple[int, int], ...] = ()


class SortedJaxpr(NamedTuple):
    """A jaxpr whose equations are sorted.

    Attributes:
      jaxpr: The jaxpr.
      consts: Values of its constants.
      steps: Its equations in order.
      inputs: The origin of each input.
      outputs: The origin of each output.
    """

    jaxpr: jaxprs.Jaxpr
    consts: Sequence[Any]
    steps: tuple[Step, ...]
    inputs: tuple[Origin, ...]
    outputs: tuple[Origin, ...]


class Site(NamedTuple):
    """A place where parameters meet the example.

    Attributes:
      equation: The equation. Where a parameter is not an operand but becomes a value of the
        example's own: the scan whose carry it starts or is stored in, or None for the loss itself.
      parameters: For each operand that depends on parameters alone: its place and origin.
      rule: The rule of the equation's primitive, if there is one parameter and a rule covers it.
      scans: Lengths of the scans around it, outermost first.
      met: For each use of what is picked from the parameter here: the rule of the product of one
        position that it is the weight of, POOLED where all look-ups are added up, or None.
    """

    equation: jaxprs.Equation
    parameters: tuple[tuple[int, Parameter], ...]
    rule: primitives.Rule | None
    scans: tuple[int, ...]
    met: tuple[Met, ...] = ()


class Program(NamedTuple):
    """The sorted per-example loss.

    Attributes:
      body: Its jaxpr.
      sites: Where parameters meet the example, in the order of their numbers.
      out_tree: Structure of what it returns.
    """

    body: SortedJaxpr
    sites: tuple[Site, ...]
    out_tree: Any


def shifting(body: SortedJaxpr) -> frozenset[int]:
    """The parameters that add the same to the loss of every example."""
    return frozenset[int]().union(
        *(step.leaves for step in body.steps),
        *(shifting(step.inner) for step in body.steps if step.inner),
    )


def walk_shared(
    program: Program, leaves: Sequence[Any], meet: Callable[[Step, list[Any]], None]
) -> None:
    """Evaluates what no example enters.

    Args:
      program: The sorted loss.
      leaves: The parameters. What depends on the example is None throughout, and is not evaluated.
      meet: Called with each equation that an example enters, and with its operands.
    """
    examples = [None] * (len(program.body.inputs) - len(leaves))
    _walk_shared(program.body, [*leaves, *examples], meet)


def _walk_shared(
    body: SortedJaxpr, inputs: Sequence[Any], meet: Callable[[Step, list[Any]], None]
) -> list[Any]:
    def visit(step: Step, values: list[Any]) -> list[Any]:
        if step.inner is not None and step.kind in {Kind.CALL, Kind.CHECKPOINT}:
            return _walk_shared(step.inner, values, meet)
        if any(value is None for value in values):
            meet(step, values)
            return [None] * len(step.equation.outvars)
        return jaxprs.evaluate(step.equation, values)

    return jaxprs.walk(body.jaxpr, body.consts, inputs, body.steps, visit, lambda x: x)
