"""Which way each parameter of the zoo is measured."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cabs_jax.moments.factored.choice import Mode, choose, copies_are_cheap, product_of
from cabs_jax.moments.factored.program import trace_program
from cabs_jax.moments.per_example import loss_and_aux
from tests.cabs_jax.moments.oracle import matches, names
from tests.cabs_jax.moments.zoo import ZOO


def choices(loss, params, batch, variance="trace"):
    program = trace_program(loss_and_aux(loss, False), params, batch)
    return choose(program, len(jax.tree.leaves(params)), variance)


@pytest.mark.slow  # together
@pytest.mark.parametrize("name", ZOO)
def test_only_parameters_named_so_are_held_for_every_example(name):
    case = ZOO[name]()
    chosen = choices(case.loss, case.params, case.batch)
    for path, choice in zip(names(case.params), chosen, strict=True):
        assert (choice.mode is Mode.PER_EXAMPLE) == matches(path, case.held), (path, choice)
        if choice.mode is Mode.UNUSED:
            assert matches(path, case.unused)


def test_separate_uses_are_measured_in_place_and_overlapping_ones_collected():
    def loss(p, x):
        apart = jnp.sum(x[:2] @ p["apart"][:2]) + jnp.sum(x[2:] @ p["apart"][2:])
        twice = jnp.sum(jnp.tanh(x @ p["twice"]) @ p["twice"].T)
        return apart + twice

    params = {"apart": jnp.ones((4, 3)), "twice": jnp.ones((4, 3))}
    apart, twice = choices(loss, params, jnp.ones((1, 4)))
    assert (apart.mode, len(apart.sites), len(apart.uses)) == (Mode.IN_PLACE, 2, 2)
    assert (twice.mode, len(twice.sites)) == (Mode.COLLECTED, 2)
    assert "2 uses" in twice.reason


def test_squares_of_entries_of_a_parameter_used_twice_need_its_gradients():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p) @ p)

    (choice,) = choices(loss, jnp.ones((3, 3)), jnp.ones((1, 3)), "diagonal")
    assert choice.mode is Mode.PER_EXAMPLE
    assert not choice.uses


def test_parameters_joined_behind_one_operand_are_told_apart_only_by_what_is_pulled_back():
    def loss(p, x):
        return jnp.sum(jnp.square(x @ jnp.concatenate([p["k"], p["q"]], axis=1)))

    params = {"k": jnp.ones((3, 2)), "q": jnp.ones((3, 2))}
    for variance, mode in (("trace", Mode.IN_PLACE), ("by_parameter", Mode.PULLED_BACK)):
        found = choices(loss, params, jnp.ones((1, 3)), variance)
        assert [choice.mode for choice in found] == [mode, mode]


def test_squares_of_entries_are_pulled_back_from_single_positions_alone():
    def loss(p, x):
        return jnp.sum(jnp.square(x @ jnp.exp(p)))

    for shape, mode in (((3,), Mode.PULLED_BACK), ((2, 3), Mode.PER_EXAMPLE)):
        (choice,) = choices(loss, jnp.ones((3, 2)), jnp.ones((1, *shape)), "diagonal")
        assert (choice.mode, choice.uses) == (mode, ())


def test_one_that_is_held_keeps_those_joined_to_it_from_being_pulled_back():
    def loss(p, x):
        computed = jnp.sum(jnp.square(x @ (p["w"] * jnp.exp(p["gain"]))))
        return computed + jnp.sum(jnp.square(x * p["gain"][:, 0]))

    params = {"w": jnp.ones((3, 2)), "gain": jnp.ones((3, 2))}
    found = choices(loss, params, jnp.ones((1, 3)))
    assert [choice.mode for choice in found] == [Mode.PER_EXAMPLE] * 2
    assert found[1].reason == "joined to one that is held"


def test_copies_of_a_bias_are_small_and_those_of_a_table_are_not():
    def added(p, x):
        return jnp.sum(jnp.square(x + p))

    def sliced(p, x):
        return jnp.sum(jnp.square(lax.dynamic_slice(p, (x[0].astype(jnp.int32),), (2,))))

    for loss, size, small in ((added, 3, True), (sliced, 9, False), (sliced, 2, True)):
        (site,) = trace_program(loss_and_aux(loss, False), jnp.ones(size), jnp.ones((1, 3))).sites
        assert copies_are_cheap(site) == small


def measured_at_a_product(name, variance="trace"):
    """The parameters of a case whose norms are taken where what is picked from them is met."""
    case = ZOO[name]()
    program = trace_program(loss_and_aux(case.loss, False), case.params, case.batch)
    found = choose(program, len(jax.tree.leaves(case.params)), variance)
    return {
        path
        for path, choice in zip(names(case.params), found, strict=True)
        for number in choice.sites
        if product_of(program.sites[number], choice, variance) is not None
    }


def pooled(name):
    """The parameters of a case of which all look-ups are known to be added up."""
    case = ZOO[name]()
    program = trace_program(loss_and_aux(case.loss, False), case.params, case.batch)
    return {
        path
        for leaf, path in enumerate(names(case.params))
        for site in program.sites
        if site.rule is not None and site.rule.pooled
        for _, parameter in site.parameters
        if leaf in parameter.leaves
    }


def test_look_ups_that_are_only_added_up_are_known():
    each_at_most_once = {"In place"}
    everything = set(names(ZOO["words_added_up"]().params))
    assert pooled("words_added_up") == everything - each_at_most_once
    assert not pooled("words_added_up_and_more")


def test_norms_of_what_is_picked_are_taken_at_the_one_product_it_is_used_in():
    everything = set(names(ZOO["picked_weights_met_once"]().params))
    assert measured_at_a_product("picked_weights_met_once") == everything
    assert not measured_at_a_product("picked_weights_met_once", "diagonal")
    assert not measured_at_a_product("picked_weights_met_otherwise")
