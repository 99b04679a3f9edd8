"""All of JAX's less stable surface that this package touches, in one place.

If an upgrade of JAX breaks the moments, this is the file to mend. It knows how to trace a function
to a jaxpr, how to evaluate one equation, and which equations hold a jaxpr of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from cabs_jax.statistics import PyTree

Jaxpr: TypeAlias = Any  # jax.extend.core.Jaxpr: it has .invars, .constvars, .eqns and .outvars
Equation: TypeAlias = Any  # jax.extend.core.JaxprEqn: it has .primitive, .invars, .outvars, .params
Atom: TypeAlias = Any  # jax.extend.core.Var or Literal: it has .aval
Value = TypeVar("Value")
Step = TypeVar("Step")

CALLS = {"jit", "pjit", "closed_call", "core_call"}
CHECKPOINTS = {"remat2", "checkpoint"}
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


def trace(function: Callable[..., PyTree], *args: PyTree) -> tuple[Any, Any]:
    """Traces a function to (closed jaxpr, tree structure of its result).

    The arguments may be arrays, tracers or ShapeDtypeStructs.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    return closed, jax.tree.structure(shape)


def first(batch: PyTree) -> PyTree:
    """The first example of a batch, or of `ShapeDtypeStruct`s that describe one.

    Not by `eval_shape`, whose result is no valid argument where some mesh axes are manual.
    """

    def row(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return jax.lax.index_in_dim(x, 0, keepdims=False)

    return jax.tree.map(row, batch)


def is_literal(atom: Atom) -> bool:
    """Whether an operand is a constant written into the jaxpr."""
    return isinstance(atom, core.Literal)


def carries_gradient(atom: Atom) -> bool:
    """Whether a value can have a gradient, being of a real or complex type."""
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


def name(equation: Equation) -> str:
    """The name of an equation's primitive."""
    return str(equation.primitive.name)


def needed(jaxpr: Jaxpr, outputs: Sequence[bool] | None = None) -> tuple[Jaxpr, list[bool]]:
    """Returns the jaxpr of some outputs, by default all, and which inputs it needs and takes."""
    without, used = dce_jaxpr(jaxpr, list(outputs or [True] * len(jaxpr.outvars)))
    return without, list(used)


def without_dead_code(jaxpr: Jaxpr) -> Jaxpr:
    """Returns the jaxpr without equations that no output needs, with all of its inputs."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def dependent(jaxpr: Jaxpr, places: Sequence[int]) -> list[bool]:
    """Which outputs of a jaxpr depend on the inputs at some places."""
    count = len(jaxpr.outvars)
    used = [needed(jaxpr, [i == j for j in range(count)])[1] for i in range(count)]
    return [any(one[place] for place in places) for one in used]


def inner_jaxpr(equation: Equation) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns the (jaxpr, constants) that a call-like equation would run.

    Raises:
      KeyError: If the equation is none of `INLINED`.
    """
    return open_jaxpr(equation.params[INLINED[name(equation)]])


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Splits a closed jaxpr into the jaxpr and its constants; an open one has none."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, ())


def evaluate(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as JAX itself would, custom derivative rules included."""
    with equation.ctx.manager:
        return _bind(equation, values)


def evaluate_now(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of constants, on no mesh: one that is traced on has no devices."""
    if name(equation) in {"mesh_cast", "reshard"}:
        return list(values)
    placed = {
        k: None for k, v in equation.params.items() if isinstance(v, jax.sharding.NamedSharding)
    }
    nowhere = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), nowhere:
        return _bind(equation.replace(params=equation.params | placed), values)


def _bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    primitive = equation.primitive
    bound = primitive.get_bind_params(equation.params)
    # Before JAX 0.10, functions came apart from the other parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    result = primitive.bind(*functions, *values, **params)
    return list(result) if primitive.multiple_results else [result]


def floating_outputs(equation: Equation, operands: dict[int, Any]) -> list[Any]:
    """Evaluates an equation on operands given by place; returns the outputs that have gradients."""
    outputs = evaluate(equation, [operands[i] for i in range(len(operands))])
    known = zip(outputs, equation.outvars, strict=True)
    return [output for output, var in known if carries_gradient(var)]


def walk(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Value],
    steps: Sequence[Step],
    visit: Callable[[Step, list[Value]], Sequence[Value]],
    constant: Callable[[Any], Value],
) -> list[Value]:
    """Goes through the equations of a jaxpr in order, and returns its outputs.

    Args:
      jaxpr: The jaxpr.
      consts: Its constants.
      inputs: Its inputs, in whatever form the walk works with.
      steps: What to hand to `visit` for each equation: the equations themselves, or what is
        known of them.
      visit: `(step, operands) -> outputs` of one equation.
      constant: Brings constants and literals into the form of the inputs.
    """
    known = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    known |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: Atom) -> Value:
        return constant(atom.val) if is_literal(atom) else known[atom]

    for equation, step in zip(jaxpr.eqns, steps, strict=True):
        known |= zip(equation.outvars, visit(step, list(map(read, equation.invars))), strict=True)
    return list(map(read, jaxpr.outvars))


def contains(jaxpr: Jaxpr, primitive_name: str) -> bool:
    """Whether a primitive occurs in a jaxpr or in any jaxpr inside it."""
    return any(
        name(equation) == primitive_name
        or any(contains(inner, primitive_name) for inner in subjaxprs(equation))
        for equation in jaxpr.eqns
    )


def subjaxprs(equation: Equation) -> list[Jaxpr]:
    """The jaxprs that an equation holds in its parameters."""
    held = [
        value
        for param in equation.params.values()
        for value in (param if isinstance(param, (tuple, list)) else [param])
    ]
    return [open_jaxpr(v)[0] for v in held if isinstance(v, (core.Jaxpr, core.ClosedJaxpr))]


def split_scan(equation: Equation, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Splits the operands of a scan into constants, carry and scanned arrays."""
    if "ft_in" in equation.params:  # from jax 0.12 on
        consts, carry, xs = equation.params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    consts = equation.params["num_consts"]
    carry = consts + equation.params["num_carry"]
    return list(values[:consts]), list(values[consts:carry]), list(values[carry:])


def counted_slices(scan: Equation) -> list[Equation]:
    """Slices in the body of a scan that take another entry of an array of constants at every step.

    They are indexed along one axis by a carry that counts the steps, as the index of a `fori_loop`
    does, and never beyond the end.
    """
    body, _ = open_jaxpr(scan.params["jaxpr"])
    consts, carry, _ = split_scan(scan, body.invars)
    starts, length = split_scan(scan, scan.invars)[1], scan.params["length"]
    made_by = {out: equation for equation in body.eqns for out in equation.outvars}
    first: dict[Any, int] = {}  # the value at the first step of all that counts
    negative = set()  # whether one of these is below zero
    for var, start, after in zip(carry, starts, body.outvars, strict=False):
        made = None if is_literal(after) else made_by.get(after)
        if is_literal(start) and made is not None and name(made) == "add":
            added = [v.val for v in made.invars if is_literal(v)]
            if var in made.invars and added == [1] and start.val >= 0:
                first[var] = int(start.val)
    slices = []
    for equation in body.eqns:
        known = [None if is_literal(v) else first.get(v) for v in equation.invars]
        if name(equation) == "convert_element_type" and known[0] is not None:
            first[equation.outvars[0]] = known[0]
        elif name(equation) == "lt" and known[0] is not None and is_literal(equation.invars[1]):
            if equation.invars[1].val == 0:
                negative.add(equation.outvars[0])
        elif name(equation) == "select_n" and known[1] is not None:
            # jnp adds the length of an axis where an index is negative: never, here.
            if not is_literal(equation.invars[0]) and equation.invars[0] in negative:
                first[equation.outvars[0]] = known[1]
        elif name(equation) == "dynamic_slice" and equation.invars[0] in consts:
            shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
            part = [axis for axis, size in enumerate(shape) if sizes[axis] != size]
            start = known[1 + part[0]] if len(part) == 1 and sizes[part[0]] == 1 else None
            if start is not None and start + length <= shape[part[0]]:
                slices.append(equation)
    return slices


def any_of_inputs_alone(
    closed: Any, given: Sequence[bool], chosen: Callable[[Equation], bool]
) -> bool:
    """Whether there is an equation whose operands depend on some inputs and on no others.

    Args:
      closed: A closed jaxpr.
      given: Whether an input is one of these. What is made of constants alone does not count.
      chosen: Which equations are meant.
    """
    found = False

    def go(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        return walk(jaxpr, consts, inputs, jaxpr.eqns, visit, lambda _: 0)

    def visit(equation: Equation, origins: list[int]) -> Sequence[int]:
        nonlocal found
        origin = max(origins, default=0)
        found |= origin == 1 and chosen(equation)
        if name(equation) in INLINED:
            return go(*inner_jaxpr(equation), origins)
        if name(equation) == "cond":
            for branch in equation.params["branches"]:
                go(*open_jaxpr(branch), origins[1:])
        elif name(equation) == "scan":
            inside, (consts, carry, xs) = equation.params["jaxpr"], split_scan(equation, origins)
            before: list[int] = []
            while carry != before:
                before = carry
                carry = list(map(max, carry, go(*open_jaxpr(inside), [*consts, *carry, *xs])))
        return [origin] * len(equation.outvars)

    go(*open_jaxpr(closed), [1 if one else 2 for one in given])
    return found


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of the enclosing shard_map over which an array is known to differ."""
    return _varying(jax.typeof(x))


def _varying(aval: Any) -> frozenset[str]:
    return frozenset(aval.mat.varying if hasattr(aval, "mat") else aval.vma)


def depends_on_place(equation: Equation) -> bool:
    """Whether an equation asks where on a mesh it runs, or has another effect."""
    return bool(equation.effects) or any(_varying(v.aval) for v in equation.outvars)


def shape_varying_like(shape: tuple[int, ...], dtype: Any, operands: PyTree) -> Any:
    """The shape of a result that differs over all axes over which one of the operands does."""
    varying = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(operands)))
    if hasattr(jax.sharding, "ManualAxisType"):
        kind: Any = jax.sharding.ManualAxisType(varying=varying)
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
    of_older: Any = jax.ShapeDtypeStruct
    return of_older(shape, dtype, vma=varying)


def visible_mesh(operands: PyTree) -> Any:
    """The mesh that arrays are known to be on, or else that the program is traced in, or None."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    return next((m for m in (*meshes, jax.sharding.get_abstract_mesh()) if not m.empty), None)


def platform(mesh: Any) -> str | None:
    """The platform of the devices of a mesh, or None where an abstract one does not tell."""
    if isinstance(mesh, jax.sharding.Mesh):
        return str(mesh.devices.flat[0].platform)
    if getattr(mesh, "abstract_device", None) is None:
        return None
    # jax 0.9 knows no more than the kind: "cpu", "TPU v5 lite" or a GPU's model.
    kind = mesh.abstract_device.device_kind.lower()
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")


def terms(jaxpr: Jaxpr, summed: tuple[bool, ...]) -> set[Any]:
    """Variables that enter the loss as terms of a sum and are used for nothing else."""
    outputs = jaxpr.outvars[: len(summed)]
    read = [*outputs, *(v for equation in jaxpr.eqns for v in equation.invars)]
    uses = Counter(v for v in read if not is_literal(v))
    candidates = [v for v, term in zip(outputs, summed, strict=True) if term]
    terms = {v for v in candidates if not is_literal(v) and uses[v] == 1}
    for equation in reversed(jaxpr.eqns):
        if name(equation) == "add" and equation.outvars[0] in terms:
            operands = [v for v in equation.invars if not is_literal(v)]
            terms |= {v for v in operands if uses[v] == 1}
    return terms
