"""A view runs through the very entries of the parameter that it stands for."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cabs_jax.moments import jaxprs
from cabs_jax.moments.factored import views

small = st.integers(1, 4)


def enumerate_atoms(atoms):
    indices = np.zeros(1, int)
    for size, stride in atoms:
        indices = (indices[:, None] + np.arange(size) * stride).ravel()
    return indices


def entries(view):
    """Indices of the parameter's entries, in the shape of the view."""
    indices = np.array(view.offset)
    for atoms in view.axes:
        indices = indices[..., None] + enumerate_atoms(atoms)
    return indices


def factorisations(size):
    """Shapes of at most three axes with so many entries."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [s for s in itertools.product(divisors, repeat=3) if math.prod(s) == size] + [(size,)]


@st.composite
def looks(draw, shape):
    """A function of an array that only rearranges, and the same in numpy."""
    steps = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["transpose", "reshape", "slice", "half"]))
        if kind == "transpose":
            order = tuple(draw(st.permutations(range(len(shape)))))
            steps.append((lambda x, a=order: x.transpose(a),) * 2)
            shape = tuple(shape[a] for a in order)
        elif kind == "reshape":
            shape = draw(st.sampled_from(factorisations(math.prod(shape))))
            steps.append((lambda x, s=shape: x.reshape(s),) * 2)
        elif kind == "slice":
            low = tuple(draw(st.integers(0, n - 1)) for n in shape)
            high = tuple(draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True))
            window = tuple(map(slice, low, high))
            steps.append((lambda x, a=low, b=high: lax.slice(x, a, b), lambda x, w=window: x[w]))
            shape = tuple(b - a for a, b in zip(low, high, strict=True))
        else:
            steps.append((lambda x: x.astype(jnp.bfloat16), lambda x: x))
    return steps


def follow(steps, shape):
    """The view after the steps that only look, and the entries it should see."""
    view, seen = views.whole(0, shape), np.arange(math.prod(shape)).reshape(shape)
    for ours, theirs in steps:
        argument = jax.ShapeDtypeStruct(seen.shape, jnp.float32)
        for equation in jax.make_jaxpr(ours)(argument).eqns:
            through = views.through([view, *[None] * (len(equation.invars) - 1)], equation)
            if isinstance(through[0], views.Mosaic):
                return view, seen
            (view,) = through
        seen = theirs(seen)
    return view, seen


shapes = st.lists(small, min_size=1, max_size=3).map(tuple)


@pytest.mark.slow
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), looks(s))))
@settings(max_examples=25, deadline=None)
def test_a_view_sees_what_the_array_holds(drawn):
    shape, steps = drawn
    view, seen = follow(steps, shape)
    np.testing.assert_array_equal(entries(view), seen)


@pytest.mark.slow
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), looks(s), looks(s))))
@settings(max_examples=25, deadline=None)
def test_disjoint_views_share_no_entry(drawn):
    shape, *both = drawn
    (first, seen), (second, other) = (follow(steps, shape) for steps in both)
    if views.disjoint(first, second):
        assert not set(seen.ravel()) & set(other.ravel())
    assert views.disjoint(first, second) == views.disjoint(second, first)


@pytest.mark.slow
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), looks(s))), st.data())
@settings(max_examples=25, deadline=None)
def test_layout_is_a_normal_form_of_the_entries_some_axes_run_through(drawn, data):
    shape, steps = drawn
    view, _ = follow(steps, shape)
    axes = tuple(data.draw(st.permutations(range(len(view.axes)))))
    axes = axes[: data.draw(st.integers(0, len(axes)))]
    flattened = enumerate_atoms([atom for axis in axes for atom in view.axes[axis]])
    normal = enumerate_atoms(views.layout(view, axes))
    np.testing.assert_array_equal(normal, np.sort(flattened))
    if views.in_order(view, axes):
        np.testing.assert_array_equal(normal, flattened)


def seen_by(function, shape):
    """What `through` says of the only equation of a function that does something."""
    *_, equation = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32)).eqns
    operands = [views.whole(0, shape), *[None] * (len(equation.invars) - 1)]
    return views.through(operands, equation)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.broadcast_to(x, (3, *x.shape)),
        lambda x: jnp.cumsum(x, 0),
        lambda x: x.astype(jnp.int32),
        lambda x: lax.mul(x, x),
        lambda x: lax.concatenate([x, x], 0),
        lambda x: lax.select(jnp.ones((4, 3), bool), x, x),
        lambda x: 2 / x,
    ],
)
def test_what_does_more_than_look_is_no_view(function):
    (equation,) = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((4, 3), jnp.float32)).eqns[-1:]
    parameter = equation.invars[0] if jaxprs.name(equation) != "div" else equation.invars[1]
    whole = views.whole(0, (4, 3))
    operands = [whole if v is parameter else None for v in equation.invars]
    assert views.through(operands, equation) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: lax.mul(x, jnp.ones((4, 3))),
        lambda x: lax.div(x, jnp.ones((4, 3))),
        lambda x: lax.slice_in_dim(x, 0, 4, 2),  # x[::2] is a gather on jax 0.9
        lambda x: lax.rev(x, (0,)),
        lambda x: lax.pad(x, jnp.float32(0), [(1, 2, 1), (-1, 0, 0)]),
        lambda x: lax.concatenate([x, jnp.ones((4, 3))], 0),
    ],
)
def test_what_scales_and_mixes_entries_with_constants_is_a_mosaic_of_them(function):
    (mosaic,) = seen_by(function, (4, 3))
    assert mosaic.pieces == (views.whole(0, (4, 3)),)


@pytest.mark.parametrize("combine", [lax.mul, lax.sub])
def test_a_scalar_that_meets_every_constant_is_there_more_than_once(combine):
    assert seen_by(lambda x: combine(x, jnp.ones((4, 3))), ()) is None


def test_adding_a_constant_changes_nothing():
    assert seen_by(lambda x: x + 1, (4, 3)) == [views.whole(0, (4, 3))]


def test_a_mosaic_has_no_entry_twice():
    def equation(function, *shapes):
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.make_jaxpr(function)(*operands).eqns[-1]

    joined = equation(lambda x, y: lax.concatenate([x, y], 0), (2, 3), (2, 3))
    first, second = views.through(
        [views.whole(0, (4, 3))], equation(lambda x: jnp.split(x, 2), (4, 3))
    )
    assert views.through([first, second], joined) == [views.Mosaic((first, second))]
    assert views.through([first, first], joined) is None
    elsewhere = second._replace(leaf=1)
    chosen = equation(lambda x, y: lax.select(jnp.ones((2, 3), bool), x, y), (2, 3), (2, 3))
    assert views.through([None, first, elsewhere], chosen) == [
        views.Mosaic((first, elsewhere), weighted=True)
    ]


def test_sums_of_different_entries_are_mosaics():
    x = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    (equation,) = jax.make_jaxpr(lambda x, y: x + y)(x, x).eqns
    first, other = views.whole(0, (4, 3)), views.whole(1, (4, 3))
    assert views.through([first, other], equation) == [views.Mosaic((first, other))]
    assert views.through([first, first], equation) is None


def test_split_gives_disjoint_views():
    first, second = seen_by(lambda x: lax.split(x, (1, 3), axis=1), (2, 4))
    np.testing.assert_array_equal(entries(first), [[0], [4]])
    np.testing.assert_array_equal(entries(second), [[1, 2, 3], [5, 6, 7]])
    assert views.disjoint(first, second)
    assert not views.disjoint(first, first)


def test_expanded_axes_hold_one_entry():
    (view,) = seen_by(lambda x: x[:, None], (3,))
    np.testing.assert_array_equal(entries(view), [[0], [1], [2]])


def test_reshaped_refuses_shapes_of_another_size_and_axes_that_do_not_nest():
    transposed = views.whole(0, (2, 3))._replace(axes=(((3, 1),), ((2, 3),)))
    assert views.reshaped(transposed, (2, 3)) is None
    assert views.reshaped(transposed, (7,)) is None
    assert views.reshaped(transposed, (0, 6)) is None
    assert entries(views.reshaped(transposed, (6,))).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_scanned_view_moves_its_leading_axis_into_the_loop():
    view = views.scanned(views.whole(0, (5, 2, 3)))
    assert view.looped == ((5, 6),)
    np.testing.assert_array_equal(entries(view), np.arange(6).reshape(2, 3))


def test_equations_are_named():
    (equation,) = jax.make_jaxpr(lambda x: x.T)(jnp.ones((2, 3))).eqns
    assert jaxprs.name(equation) == "transpose"
